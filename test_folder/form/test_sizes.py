"""Sides, ratios, megapixels and an image's shape become a size; a seed is drawn if none is given."""

import pytest
from PIL import Image

from klora.errors import RequestError
from test_folder.form.asked import CHOICES, PICTURE, RATIOS, request


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("multiple", [8, 16])
def test_one_megapixel_has_the_sides_that_flux_on_replicate_makes(ratio: str, multiple: int) -> None:
    assert request(aspect_ratio=ratio).size(1024, multiple) == RATIOS[ratio]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("multiple", [8, 16])
def test_a_quarter_megapixel_halves_both_sides(ratio: str, multiple: int) -> None:
    assert request(aspect_ratio=ratio, megapixels="0.25").size(1024, multiple) == tuple(
        side // 2 for side in RATIOS[ratio]
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("megapixels", CHOICES["megapixels"])
@pytest.mark.parametrize(("native", "multiple"), [(1024, 8), (1024, 16), (512, 8), (64, 8), (64, 16)])
def test_any_size_is_of_whole_multiples_nearest_to_ratio_and_area(
    ratio: str, megapixels: str, native: int, multiple: int
) -> None:
    size = request(aspect_ratio=ratio, megapixels=megapixels).size(native, multiple)
    exact = [side * native / 1024 * float(megapixels) ** 0.5 for side in RATIOS[ratio]]
    assert [side % multiple for side in size] == [0, 0]
    assert all(side > 0 for side in size)
    assert all(abs(side - wanted) <= multiple / 2 for side, wanted in zip(size, exact, strict=True))


def test_without_ratio_sides_or_image_the_size_is_the_bases_own() -> None:
    assert request().size(64, 8) == (64, 64)


@pytest.mark.parametrize("aspect_ratio", [None, "custom"])
@pytest.mark.parametrize(
    ("sides", "size"),
    [({"width": 640}, (640, 512)), ({"height": 640}, (512, 640)), ({"width": 100, "height": 2048}, (100, 2048))],
)
def test_a_side_that_is_named_is_kept_and_the_other_is_the_bases_own(
    aspect_ratio: str | None, sides: dict[str, int], size: tuple[int, int]
) -> None:
    asked = request(aspect_ratio=aspect_ratio, megapixels="0.25", image=PICTURE, **sides)
    assert asked.size(512, 16) == size


@pytest.mark.parametrize("aspect_ratio", [None, "match_input_image"])
def test_an_image_gives_its_shape_to_the_bases_own_area(aspect_ratio: str | None) -> None:
    asked = request(aspect_ratio=aspect_ratio, image=PICTURE)
    assert asked.size(1024, 8) == (1776, 592)
    assert asked.size(64, 8) == (112, 40)


def test_an_images_shape_is_scaled_by_megapixels_and_yields_to_a_ratio() -> None:
    assert request(image=PICTURE, megapixels="0.25").size(1024, 8) == (888, 296)
    assert request(image=PICTURE, aspect_ratio="4:3").size(1024, 8) == RATIOS["4:3"]


@pytest.mark.parametrize("sides", [(1, 1_000_000), (1_000_000, 1), (100, 401), (401, 100)])
def test_an_image_too_thin_to_draw_is_refused_unless_a_ratio_is_named(sides: tuple[int, int]) -> None:
    image = Image.new("1", sides)
    with pytest.raises(RequestError, match=rf"^image is {sides[0]}x{sides[1]}\. Expected sides of at most 4 to 1\.$"):
        request(image=image).size(1024, 16)
    assert request(image=image, aspect_ratio="1:1").size(1024, 16) == (1024, 1024)


def test_an_image_of_four_to_one_is_as_thin_as_may_be() -> None:
    assert request(image=Image.new("1", (400, 100))).size(1024, 16) == (2048, 512)


def test_a_seed_is_drawn_anew_for_each_request_unless_given() -> None:
    seeds = {request().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request(seed=0).seed == 0
