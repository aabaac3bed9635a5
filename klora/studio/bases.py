"""Base models kept on an accelerator, as many as fit: the least recently used ones make room for the next."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from klora.device import default_dtype, has_float8, release
from klora.errors import BaseModelError
from klora.generation import Encode, plain_encoder
from klora.layers import HEADROOM_BYTES
from klora.models import files_read, load_model
from klora.models.compiling import compile_blocks, warm_up
from klora.models.family import Family

logger = logging.getLogger(__name__)
Products = Literal["own", "float8"]
"""How compiled blocks multiply: in the base's own dtype, or in float8 where matrix products are most of a step."""

PROMPTS = 16  # whose embeddings are kept for each base: 4 MB each on FLUX.1


class ResidentBases:
    """Loaded bases, least recently used first. free: bytes that a device has left.  compiled: how the blocks
    multiply that prepare() compiles, None to compile none.  spare: frees memory that is cheaper to fill again than a
    base's."""

    def __init__(
        self,
        device: torch.device,
        free: Callable[[torch.device], int],
        *,
        compiled: Products | None,
        spare: Callable[[], None] = lambda: None,
    ) -> None:
        self.device, self._free, self._compiled, self._spare = device, free, compiled, spare
        self._bases: OrderedDict[str, tuple[Family, Encode]] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Names of the loaded bases, least recently used first."""
        return list(self._bases)

    def encoder(self, name: str) -> Encode:
        """A loaded base's plain_encoder(), which remembers the last PROMPTS."""
        return self._bases[name][1]

    def prepare(self, bases: Iterable[tuple[str, str, Path]]) -> None:
        """Load, in their order, those that fit beside one another. bases: (name, key of FAMILIES, folder) each. Raises
        BaseModelError."""
        # One after the other: while a model is made, its libraries change torch for all threads.
        for name, family, path in bases:
            if self._bases and not self._fits(_bytes_of(path, default_dtype(self.device))):
                logger.info("%s will be loaded when it is asked for: memory is short", name)
            else:
                self.load(name, family, path)
        for name, (model, _) in self._bases.items():  # once there is as much memory as requests will find
            layers = len(model.inventory[model.component])  # asked for now, or the first LoRA would wait for it
            logger.info("LoRAs may adapt %d layers of %s", layers, name)
            if self._compiled:
                float8 = self._compiled == "float8" and not model.host_bound and has_float8(self.device)
                compile_blocks(model, float8=float8)
                logger.info("compiled %s's blocks, which multiply in %s", name, "float8" if float8 else "its dtype")
            if self.device.type == "cuda":
                warm_up(model)

    def load(self, name: str, family: str, path: Path) -> Family:
        """The base, loaded if need be; others leave the accelerator when its memory is short. Raises BaseModelError."""
        if name not in self._bases:
            dtype = default_dtype(self.device)
            self._make_room(name, _bytes_of(path, dtype))
            model = load_model(family, path, self.device, dtype)
            self._bases[name] = model, lru_cache(PROMPTS)(plain_encoder(model))
            logger.info("loaded %s from %s", name, path)
        self._bases.move_to_end(name)
        return self._bases[name][0]

    def _fits(self, needed: int) -> bool:
        return self._free(self.device) >= needed + HEADROOM_BYTES

    def _make_room(self, name: str, needed: int) -> None:
        """Free what can be spared, then bases, until another of needed bytes fits. Raises BaseModelError, and frees no
        base, where that would not be enough."""
        if not self._fits(needed):
            self._spare()
            release(self.device)
        within_reach = self._free(self.device) + sum(_held_by(model) for model, _ in self._bases.values())
        if needed > within_reach:
            raise BaseModelError(
                f"{name} needs {needed / 1e9:.1f} GB of memory on {self.device}, where {within_reach / 1e9:.1f} GB can "
                "be had. Expected a larger device or a smaller base."
            )
        while self._bases and not self._fits(needed):
            leaving = self._bases.popitem(last=False)[0]
            logger.info("%s leaves %s: memory is short", leaving, self.device)
            release(self.device)


def _bytes_of(path: Path, dtype: torch.dtype) -> int:
    """Bytes of memory that a base's weights take when loaded in a dtype, whatever the dtype of its files."""
    try:
        return sum(file.stat().st_size + _growth(file, dtype) for file in files_read(path))
    except (OSError, SafetensorError):
        return 0  # load_model will say what is wrong with it


def _growth(file: Path, dtype: torch.dtype) -> int:
    """Bytes that a file's tensors take in a dtype less those in its own; may be negative."""
    sizes, grown = {"F32": 4, "F16": 2, "BF16": 2}, 0
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118, it is no mapping
            tensor = tensors.get_slice(key)
            grown += prod(tensor.get_shape()) * (dtype.itemsize - sizes.get(tensor.get_dtype(), dtype.itemsize))
    return grown


def _held_by(model: Family) -> int:
    """Bytes of a loaded base's parameters."""
    modules = (part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module))
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
