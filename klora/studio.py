"""Bases kept ready, and requests turned into images: what predict.py and the `klora` command share.

Knows no form, no HTTP and no environment. Between requests it remembers loaded bases and LoRAs, nothing else.
"""

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from PIL import Image

from klora.device import default_device, default_dtype, free_bytes
from klora.errors import LoRAError, SafetyError
from klora.generate import Record, generate
from klora.layers import HEADROOM_BYTES
from klora.models import FAMILIES, load_model, origin_of, weight_files
from klora.models.family import Family
from klora.models.safety import SafetyChecker
from klora.request import Request
from klora.shelf import Shelf, keep_scores

logger = logging.getLogger(__name__)
T = TypeVar("T")


FindBase = Callable[[str | None, str | None], tuple[str, str, Path]]
"""(a base's name or None, the family that its LoRAs need or None) -> (name, key of FAMILIES, folder)."""


class Studio:
    """Loaded bases, least recently used first, and the safety checker."""

    def __init__(
        self,
        find_base: FindBase,
        safety_checker: Path,
        device: torch.device | None = None,
        free: Callable[[torch.device], int] = free_bytes,
    ) -> None:
        self.device = device or default_device()
        self._find_base, self._safety_checker, self._free = find_base, safety_checker, free
        self._bases: OrderedDict[str, Family] = OrderedDict()
        self._shelf = Shelf()
        self._checker: SafetyChecker | None = None

    @property
    def resident(self) -> list[str]:
        """Names of the loaded bases, least recently used first."""
        return list(self._bases)

    def load(self, name: str, family: str, path: Path) -> Family:
        """The base, loaded if need be; others leave the accelerator when its memory is short. Raises BaseModelError."""
        if name not in self._bases:
            parts = [part for part in path.glob("*") if part.is_dir()]
            self._make_room(sum(file.stat().st_size for part in parts for file in weight_files(part)))
            self._bases[name] = load_model(family, path, self.device, default_dtype(self.device))
            logger.info("loaded %s from %s", name, path)
        self._bases.move_to_end(name)
        return self._bases[name]

    def make(
        self,
        request: Request,
        loras: Mapping[str, Path],
        record: Record = lambda name, value: None,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        scores: Mapping[str, Path] = MappingProxyType({}),
    ) -> dict[int, Image.Image]:
        """{place in the batch: image}, without the images that the safety checker withholds. Raises KLoRAError.

        loras: files by input, "content_lora" and "style_lora". Without request.model the LoRAs choose the base.
        scores: by input, where K-LoRA's scores of a file may be kept; computed anew where that is not given.
        """
        found = {name: _said_of(name, origin_of, path) for name, path in loras.items()}
        made_for = {name: origin for name, origin in found.items() if origin}
        needed = next((origin.family for origin in made_for.values() if origin.family), None)
        base, family, path = self._find_base(request.model, needed)
        for name, origin in made_for.items():
            if origin.family != family:
                raise LoRAError(
                    f"{name} was made for {origin}, but this request runs {base}. Expected one for "
                    f"{FAMILIES[family].name}."
                )
        checker = None if request.disable_safety_checker else self._safety()
        model = self.load(base, family, path)
        read = {}
        for name, file in loras.items():
            lora = self._shelf.take(base, file, partial(_said_of, name, model.read_lora), scores.get(name))
            logger.info("%s: %s", name, lora.report)
            read[name.removesuffix("_lora")] = lora
        images = generate(model, request, **read, record=record, on_step=on_step)
        for name, place in scores.items():
            keep_scores(place, read[name.removesuffix("_lora")])
        return _shown(images, checker)

    def _make_room(self, needed: int) -> None:
        while self._bases and self._free(self.device) < needed + HEADROOM_BYTES:
            name = self._bases.popitem(last=False)[0]
            logger.info("%s leaves %s: memory is short", name, self.device)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _safety(self) -> SafetyChecker:
        if self._checker is None:
            self._checker = SafetyChecker.load(self._safety_checker, self.device)
        return self._checker


def save_images(images: Mapping[int, Image.Image], folder: Path, request: Request) -> list[Path]:
    """Write klora_<seed + i>_<i>.<format>, i the place in the batch; what is returned is there."""
    folder.mkdir(parents=True, exist_ok=True)
    quality = None if request.output_format == "png" else request.output_quality
    paths = {index: folder / f"klora_{request.seed + index}_{index}.{request.output_format}" for index in images}
    for index, path in paths.items():
        images[index].save(path, quality=quality)
    return list(paths.values())


def _said_of(name: str, read: Callable[[Path], T], path: Path) -> T:
    """read(path), what is wrong with the file being said of the input that names it."""
    try:
        return read(path)
    except LoRAError as error:
        raise LoRAError(f"{name}: {error}") from error


def _shown(images: list[Image.Image], checker: SafetyChecker | None) -> dict[int, Image.Image]:
    flags = checker.flagged(images) if checker else [False] * len(images)
    withheld = ", ".join(str(index) for index, flag in enumerate(flags) if flag)
    if all(flags):
        raise SafetyError(
            f"The safety checker withheld every image ({withheld}). "
            "Try another prompt or seed, or set disable_safety_checker=true."
        )
    if withheld:
        logger.warning("The safety checker withheld these images of the batch: %s.", withheld)
    return {index: image for index, (image, flag) in enumerate(zip(images, flags, strict=True)) if not flag}
