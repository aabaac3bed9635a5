"""Pictures and captions as the denoiser reads them, encoded once. Everything here is float32 on the CPU.

The VAE encodes each view of a picture once, to a posterior, of which each batch takes a new sample. Knows no optimiser.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.errors import RequestError
from klora.models.family import Conditioning, Family, Posterior
from klora.training.buckets import buckets, fit, nearest_bucket
from klora.training.config import TrainConfig
from klora.training.dataset import Picture

RANDOM_VIEWS = 4  # crops of each picture, when crop is random


@dataclass(frozen=True)
class View:
    """A picture cut to its bucket in one way. mask: the loss weights of its latent cells, [1, H/8, W/8] in [0, 1];
    time_ids: [6], as in Crop."""

    posterior: Posterior
    time_ids: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Example:
    """One picture at one resolution. size: (width, height) of all its views, in pixels."""

    views: tuple[View, ...]
    caption: str
    size: tuple[int, int]


@torch.no_grad()
def encode_pictures(
    model: Family, pictures: Sequence[Picture], captions: Sequence[str], config: TrainConfig
) -> Iterator[Example]:
    """An example of each picture, and its caption, at each resolution. Raises RequestError."""
    for resolution in resolutions(model, config):
        sizes = [size for size in buckets(resolution) if config.crop != "center" or size[0] == size[1]]
        for picture, caption in zip(pictures, captions, strict=True):
            image, mask = picture.open(), picture.open_mask() if config.mask_mode != "none" else None
            size = nearest_bucket(image.size, sizes)
            views = []
            for number, flip in _views(config):
                draw = keyed_generator(config.seed, "crop", picture.fingerprint, number)
                crop = fit(image, size, mode=config.crop, flip=flip, generator=draw, mask=mask)
                posterior = Posterior(*(part[0].float().cpu() for part in model.encode_images(crop.pixels[None])))
                time_ids = torch.tensor(crop.time_ids, dtype=torch.float32)
                views.append(View(posterior, time_ids, _weights(crop.mask, posterior, config, picture)))
            yield Example(tuple(views), caption, size)


@torch.no_grad()
def encode_texts(model: Family, captions: Iterable[str]) -> dict[str, Conditioning]:
    """{caption: what the text encoders make of it and, where a family has one, of the negative prompt}."""
    encoded = {caption: model.encode_prompt([caption]) for caption in sorted(set(captions))}
    return {caption: {name: part.cpu() for name, part in parts.items()} for caption, parts in encoded.items()}


def resolutions(model: Family, config: TrainConfig) -> list[int]:
    """The sides, in pixels, of the squares to whose areas pictures are scaled: the config's, else the base's."""
    shares = model.recipe.resolutions
    return list(config.sides or (round(share * model.native_size / 16) * 16 for share in shares))


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A new CPU generator, whose state (seed, *key) alone decides."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _views(config: TrainConfig) -> list[tuple[int, bool]]:
    """(number of the crop, whether mirrored) of each view of a picture."""
    flips = (False, True) if config.horizontal_flip else (False,)
    return [(number, flip) for number in range(RANDOM_VIEWS if config.crop == "random" else 1) for flip in flips]


def _weights(mask: Tensor | None, posterior: Posterior, config: TrainConfig, picture: Picture) -> Tensor | None:
    """The loss weights of a picture's latent cells, [1, H/8, W/8]: its mask [1, H, W] averaged over each, or 1 without
    a mask; None where the config wants no masks."""
    if config.mask_mode == "none":
        return None
    cells = posterior.mean.shape[-2:]
    if mask is None:
        return torch.ones(1, *cells)
    weights = F.interpolate(mask[None], cells, mode="area")[0].clamp(min=config.mask_min_weight)
    if not weights.any():
        raise RequestError(f"The mask of {picture.name!r} is black in all that is kept of it. Expected some white.")
    return weights
