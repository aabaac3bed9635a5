"""Aspect-ratio buckets: which sizes pictures are trained at, how one is cut to size, which are trained together.

Knows nothing of files, captions or models. Sizes are (width, height) in pixels.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from klora.errors import RequestError

Size = tuple[int, int]

MAX_RATIO = 2  # of one side to the other
MAX_AREA_ERROR = 0.1  # of a bucket's area, so that no shape costs or counts much more than another


@dataclass(frozen=True)
class Crop:
    """A picture cut to a bucket.

    pixels: float32 [3, H, W] in [-1, 1].   mask: float32 [1, H, W] in [0, 1].   time_ids: SDXL's size conditioning,
    (original height, original width, crop top, crop left, target height, target width), where the original is the
    picture before it was resized and the crop is counted in resized, and mirrored, pixels.
    """

    pixels: Tensor
    mask: Tensor | None
    time_ids: tuple[int, int, int, int, int, int]


def buckets(resolution: int) -> list[Size]:
    """Sizes of about resolution² pixels, from the tallest to the widest: the square, and what is within 10 % of it.

    Sides are multiples of a 16th of the resolution, but of 16 (the least that FLUX.1 can pack) to 64.
    """
    multiple = min(64, max(16, resolution // 256 * 16))
    area = resolution**2
    square = round(resolution / multiple) * multiple
    sizes = {(square, square)}
    for width in range(square + multiple, MAX_RATIO * resolution, multiple):
        height = round(area / width / multiple) * multiple
        if width <= MAX_RATIO * height and abs(width * height / area - 1) <= MAX_AREA_ERROR:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to this size's, by the logarithm of width over height."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))


def fit(
    image: Image.Image,
    bucket: Size,
    *,
    mode: str,
    flip: bool,
    generator: torch.Generator | None = None,
    mask: Image.Image | None = None,
) -> Crop:
    """The largest part of a picture that has the bucket's shape, at the bucket's size; mirrored if flip.

    image: RGB.   mask: L, as large as the image.   mode: "bucket" and "center" cut at the centre (for "center" hand in
    a square bucket), "random" anywhere, as the generator says, "salience" around the mask's centre of mass.
    Raises RequestError.
    """
    if mask is not None and mask.size != image.size:
        raise RequestError(f"mask is {_times(mask.size)}, its picture {_times(image.size)}. Expected equal sizes.")
    resized = _covering(image.size, bucket)
    spare = resized[0] - bucket[0], resized[1] - bucket[1]
    left, top = _corner(mode, spare, bucket, generator, mask)
    # Only the part that is kept is resized: a 5000x70 picture would be 42 megapixels on the way to 1408x768.
    x_scale, y_scale = image.width / resized[0], image.height / resized[1]
    right, bottom = min(image.width, (left + bucket[0]) * x_scale), min(image.height, (top + bucket[1]) * y_scale)
    box = left * x_scale, top * y_scale, right, bottom
    pixels = _tensor(image.resize(bucket, Image.Resampling.LANCZOS, box)) / 127.5 - 1
    # Bilinear, because Lanczos rings: an edge would leave traces where the mask is zero.
    weights = None if mask is None else _tensor(mask.resize(bucket, Image.Resampling.BILINEAR, box)) / 255
    if flip:
        pixels, weights = pixels.flip(-1), None if weights is None else weights.flip(-1)
        left = spare[0] - left
    return Crop(pixels, weights, (image.height, image.width, top, left, bucket[1], bucket[0]))


def batches(sizes: Sequence[Size], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every index once, a batch's in one bucket, in an order that (seed, epoch) alone
    decides.

    sizes: the bucket of every picture.   The last batch of a bucket may be short. A bucket with fewer pictures than one
    batch is repeated, in its shuffled order, until the batch is full; only there does an index come more than once.
    """
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    epoch_batches: list[list[int]] = []
    for bucket in sorted(set(sizes)):
        members = [index for index, size in enumerate(sizes) if size == bucket]
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        order += [order[i % len(order)] for i in range(len(order), batch_size)]
        epoch_batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [epoch_batches[i] for i in torch.randperm(len(epoch_batches), generator=generator).tolist()]


def _covering(size: Size, bucket: Size) -> Size:
    """The smallest size of this shape that covers the bucket; rounding stretches it by less than a pixel."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return round(size[0] * scale), round(size[1] * scale)


def _corner(mode: str, spare: Size, bucket: Size, generator: torch.Generator | None, mask: Image.Image | None) -> Size:
    """(left, top) of the part that is kept, in pixels of the resized picture."""
    if mode == "random":
        if generator is None:
            raise ValueError("a random crop needs a generator")
        left, top = (int(torch.randint(room + 1, (), generator=generator)) for room in spare)
        return left, top
    if mode == "salience" and mask is not None and mask.getbbox():
        weights = np.asarray(mask)
        centres = (np.average(np.arange(n) + 0.5, weights=weights.sum(axis)) / n for axis, n in enumerate(mask.size))
        corners = (c * (s + b) - b / 2 for c, s, b in zip(centres, spare, bucket, strict=True))
        left, top = (round(min(max(0, corner), room)) for corner, room in zip(corners, spare, strict=True))
        return left, top
    return spare[0] // 2, spare[1] // 2


def _tensor(image: Image.Image) -> Tensor:
    """Float32 [channels, H, W] in 0 to 255."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, -1).permute(2, 0, 1).float().contiguous()


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
