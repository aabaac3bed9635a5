"""Buckets: their areas and shapes, where a picture is cut, and in which order pictures are trained."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from PIL import Image
from torch import Tensor

from klora.errors import RequestError
from klora.training.buckets import Crop, batches, buckets, fit, nearest_bucket

RESOLUTIONS = (64, 128, 256, 512, 768, 1000, 1024, 1536, 2048)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, blue is 128: every place tells where it is."""
    across, down = Image.linear_gradient("L").rotate(90), Image.linear_gradient("L")
    size = width, height
    return Image.merge("RGB", [across.resize(size), down.resize(size), Image.new("L", size, 128)])


def grain(width: int, height: int) -> Image.Image:
    """Noise around the middle grey, far enough from black and white for Lanczos to stay between them."""
    data = random.Random(0).randbytes(width * height * 3)
    return Image.frombytes("RGB", (width, height), data).point(lambda level: 96 + level // 4)


def levels(image: Image.Image) -> Tensor:
    flat = torch.tensor(list(image.tobytes()), dtype=torch.float64)
    return flat.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1)


def random_crop(image: Image.Image, bucket: tuple[int, int], seed: int, *, flip: bool = False) -> Crop:
    return fit(image, bucket, mode="random", flip=flip, generator=torch.Generator().manual_seed(seed))


# Sizes.


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_bucket_is_within_ten_percent_of_the_area_and_two_to_one(resolution: int) -> None:
    for width, height in buckets(resolution):
        assert abs(width * height / resolution**2 - 1) <= 0.1
        assert max(width, height) <= 2 * min(width, height)


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 16), (256, 16), (512, 32), (1024, 64), (2048, 64)])
def test_sides_are_multiples_that_shrink_with_the_resolution(resolution: int, multiple: int) -> None:
    assert math.gcd(*(side for size in buckets(resolution) for side in size)) == multiple
    assert (resolution, resolution) in buckets(resolution)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_a_bucket_on_its_side_is_a_bucket(resolution: int) -> None:
    found = buckets(resolution)
    assert len(found) == len(set(found)) >= 3
    assert {(height, width) for width, height in found} == set(found)
    assert found == sorted(found, key=lambda size: size[0] / size[1])


def test_a_resolution_between_multiples_still_has_a_square() -> None:
    assert (64, 64) in buckets(72) or (80, 80) in buckets(72)


def test_the_nearest_bucket_is_nearest_in_the_logarithm_of_the_ratio() -> None:
    found = buckets(1024)
    assert nearest_bucket((1440, 1440), found) == (1024, 1024)
    assert nearest_bucket((5000, 70), found) == found[-1]
    assert nearest_bucket((1, 5000), found) == found[0]
    # 1.4 lies nearer to 2 on the line (0.6 against 0.4 of 1), but 1.43 is past the geometric mean, 1.41.
    assert nearest_bucket((143, 100), [(64, 64), (128, 64)]) == (128, 64)


# Crops.


@pytest.mark.parametrize("size", [(16, 16), (70, 5000), (5000, 70), (300, 200), (128, 128), (1, 500)])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_crop_equals_resizing_the_whole_and_cutting(size: tuple[int, int], seed: int | None) -> None:
    image, bucket = grain(*size), nearest_bucket(size, buckets(128))
    crop = fit(image, bucket, mode="bucket", flip=False) if seed is None else random_crop(image, bucket, seed)
    height, width, top, left, bottom, right = crop.time_ids
    scale = max(bucket[0] / width, bucket[1] / height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    wanted = levels(whole.crop((left, top, left + right, top + bottom)))
    assert (height, width) == (size[1], size[0])
    assert (right, bottom) == bucket
    assert (
        (crop.pixels.double() + 1) * 127.5 - wanted
    ).abs().max() <= 2.01  # Pillow rounds after each pass, and picks their order by the size


def test_a_random_size_is_never_stretched_by_more_than_a_pixel() -> None:
    draw = random.Random(0)
    for _ in range(150):
        size = draw.randint(16, 400), draw.randint(16, 400)
        bucket = nearest_bucket(size, buckets(64))
        crop = fit(Image.new("RGB", size), bucket, mode="bucket", flip=False)
        height, width, top, left, bottom, right = crop.time_ids
        scale = max(bucket[0] / width, bucket[1] / height)
        assert crop.pixels.shape == (3, bottom, right) == (3, bucket[1], bucket[0])
        assert abs(2 * left + right - width * scale) <= 1.5
        assert abs(2 * top + bottom - height * scale) <= 1.5  # 1 of rounding the middle, 0.5 of rounding the size


@pytest.mark.parametrize("mode", ["bucket", "center", "salience"])
def test_the_middle_is_cut_out_by_hand(mode: str) -> None:
    crop = fit(ramp(400, 200), (64, 64), mode=mode, flip=False)
    assert crop.time_ids == (200, 400, 0, 32, 64, 64)
    assert fit(ramp(200, 400), (64, 64), mode=mode, flip=False).time_ids == (400, 200, 32, 0, 64, 64)


SHOWN = [  # columns of a mask of 400 and how white they are, and where a crop of 64 out of 128 begins
    ([(0, 200, 85), (200, 400, 255)], 48),  # the centre of mass is at 250
    ([(0, 20, 255)], 0), ([(380, 400, 1)], 64), ([], 32),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "place"), SHOWN)
def test_salience_is_around_the_masks_centre_of_mass(columns: list[tuple[int, int, int]], place: int) -> None:
    mask = Image.new("L", (400, 200))
    for start, stop, level in columns:
        mask.paste(level, (start, 0, stop, 200))
    upright = mask.transpose(Image.Transpose.TRANSPOSE)
    for mode, begins in (("salience", place), ("bucket", 32)):
        crop = fit(ramp(400, 200), (64, 64), mode=mode, flip=False, mask=mask)
        assert crop.time_ids == (200, 400, 0, begins, 64, 64)
        crop = fit(ramp(200, 400), (64, 64), mode=mode, flip=False, mask=upright)
        assert crop.time_ids == (400, 200, begins, 0, 64, 64)


def test_salience_counts_from_the_middle_of_a_masks_pixels() -> None:
    mask = Image.new("L", (8, 4))
    mask.putpixel((5, 2), 255)  # at 16 times the size it is from 80 to 96
    crop = fit(ramp(8, 4), (64, 64), mode="salience", flip=False, mask=mask)
    assert crop.time_ids == (4, 8, 0, 88 - 32, 64, 64)


def test_pixels_are_float32_from_minus_one_to_one_and_red_comes_first() -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 51))
    pixels = fit(image, (64, 64), mode="bucket", flip=False).pixels
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert torch.equal(pixels[0], torch.ones(64, 64))
    assert torch.equal(pixels[1], -torch.ones(64, 64))
    torch.testing.assert_close(pixels[2], torch.full((64, 64), -0.6))


@pytest.mark.parametrize("seed", range(4))
def test_a_mirrored_crop_counts_its_left_edge_in_the_mirrored_picture(seed: int) -> None:
    image = ramp(331, 128)
    plain, mirrored = random_crop(image, (128, 128), seed), random_crop(image, (128, 128), seed, flip=True)
    assert torch.equal(mirrored.pixels, plain.pixels.flip(-1))
    assert mirrored.time_ids[3] == 331 - 128 - plain.time_ids[3]
    left = mirrored.time_ids[3]
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((left, 0, left + 128, 128))
    assert ((mirrored.pixels.double() + 1) * 127.5 - levels(turned)).abs().max() < 0.01


def test_random_crops_reach_both_ends_and_follow_their_generator() -> None:
    image = Image.new("RGB", (68, 64))
    lefts = [random_crop(image, (64, 64), seed).time_ids[3] for seed in range(60)]
    assert set(lefts) == {0, 1, 2, 3, 4}
    assert lefts == [random_crop(image, (64, 64), seed).time_ids[3] for seed in range(60)]
    with pytest.raises(ValueError, match="generator"):
        fit(image, (64, 64), mode="random", flip=False)


def test_a_mask_is_cut_where_its_picture_is() -> None:
    image = Image.new("RGB", (300, 100))
    image.paste((255, 255, 255), (200, 0, 300, 100))
    for flip in (False, True):
        crop = fit(image, (128, 64), mode="bucket", flip=flip, mask=image.convert("L"))
        assert crop.mask is not None
        assert crop.mask.shape == (1, 64, 128)
        assert crop.mask.dtype == torch.float32
        assert (crop.mask.min(), crop.mask.max()) == (0, 1)
        assert ((crop.pixels[:1] + 1) / 2 - crop.mask).abs().mean() < 0.01  # but for the rings of Lanczos
        assert (crop.mask[..., :8] if flip else crop.mask[..., -8:]).mean() > 0.9


def test_a_mask_leaves_no_trace_where_it_is_black() -> None:
    mask = Image.new("L", (200, 200))
    mask.paste(255, (100, 0, 200, 200))
    for side in (64, 512):
        crop = fit(Image.new("RGB", mask.size), (side, side), mode="bucket", flip=False, mask=mask)
        assert crop.mask is not None
        assert crop.mask[..., : side // 2 - 4].max() == 0


def test_a_picture_without_a_mask_has_none_and_a_mask_of_another_size_is_refused() -> None:
    image = Image.new("RGB", (64, 64))
    assert fit(image, (64, 64), mode="bucket", flip=False).mask is None
    with pytest.raises(RequestError, match="mask is 64x32, its picture 64x64"):
        fit(image, (64, 64), mode="bucket", flip=False, mask=Image.new("L", (64, 32)))


# Batches.


def drawn_sizes(seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [draw.choice(buckets(128)) for _ in range(draw.randint(1, 60))]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_epoch_has_every_index_once_and_repeats_only_in_buckets_below_one_batch(seed: int, batch_size: int) -> None:
    sizes = drawn_sizes(seed)
    found = batches(sizes, batch_size, seed=seed, epoch=0)
    members = Counter(sizes)
    assert all(len({sizes[index] for index in batch}) == 1 for batch in found)
    assert set(Counter(index for batch in found for index in batch)) == set(range(len(sizes)))
    for batch in found:
        held = members[sizes[batch[0]]]
        expected = {batch_size} if held <= batch_size else {batch_size, held % batch_size}
        assert len(batch) in expected
        assert set(Counter(batch).values()) <= {1, batch_size // held, -(-batch_size // held)}
    large = [index for batch in found for index in batch if members[sizes[index]] >= batch_size]
    assert len(large) == len(set(large))
    assert len(found) == sum(-(-held // batch_size) for held in members.values())


def test_a_small_bucket_is_repeated_in_its_order() -> None:
    (batch,) = batches([(64, 64)] * 3, 8, seed=1, epoch=0)
    assert batch == (batch[:3] * 3)[:8]
    assert sorted(batch[:3]) == [0, 1, 2]


def test_the_order_is_made_by_seed_and_epoch_alone() -> None:
    sizes = [(64, 64)] * 20 + [(48, 80)] * 20
    state = torch.manual_seed(1).get_state()
    first = batches(sizes, 4, seed=7, epoch=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert batches(sizes, 4, seed=7, epoch=3) == first
    others = [batches(sizes, 4, seed=seed, epoch=epoch) for seed, epoch in [(7, 4), (8, 3), (3, 7), (8, 2)]]
    assert all(other != first for other in others)


def test_neighbours_share_no_batch_and_batches_of_one_bucket_are_not_kept_together() -> None:
    found = batches([(64, 64)] * 40 + [(48, 80)] * 40, 4, seed=0, epoch=0)
    kinds = [batch[0] < 40 for batch in found]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 3
    assert sum(batch == list(range(batch[0], batch[0] + 4)) for batch in found) < 3


def test_no_pictures_make_no_batches() -> None:
    assert batches([], 4, seed=0, epoch=0) == []
