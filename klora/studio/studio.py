"""Bases kept ready, and requests turned into images: what predict.py and the `klora` command share.

Knows no form, no HTTP and no environment. Between requests it remembers loaded bases and LoRAs, nothing else.
"""

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from klora.cache import Borrowed
from klora.device import default_device, default_dtype, free_bytes
from klora.errors import BaseModelError, LoRAError, SafetyError
from klora.form.request import Request
from klora.generate import Encode, Record, generate, plain_encoder
from klora.layers import HEADROOM_BYTES
from klora.lora import LoRA
from klora.models import FAMILIES, files_read, load_model, origin_of
from klora.models.family import Family
from klora.models.pace import compile_blocks
from klora.models.safety import SafetyChecker
from klora.studio.provenance import Provenance, UsedLoRA, canonical, settled, stamp
from klora.studio.shelf import Shelf, keep_scores

logger = logging.getLogger(__name__)
T = TypeVar("T")
PROMPTS = 16  # remembered as a base's text encoders have read them: 4 MB each on FLUX.1

FindBase = Callable[[str | None, str | None], tuple[str, str, Path]]
"""(a base's name or None, the family that its LoRAs need or None) -> (name, key of FAMILIES, folder)."""


class Studio:
    """Loaded bases, least recently used first, and the safety checker. compiled: whether go_fast finds compiled blocks,
    which takes minutes when a base is loaded."""

    def __init__(
        self,
        find_base: FindBase,
        safety_checker: Path,
        device: torch.device | None = None,
        free: Callable[[torch.device], int] = free_bytes,
        *,
        compiled: bool = False,
    ) -> None:
        self.device, self._compiled = device or default_device(), compiled
        self._find_base, self._safety_checker, self._free = find_base, safety_checker, free
        self._bases: OrderedDict[str, Family] = OrderedDict()
        self._encode: dict[str, Encode] = {}
        self._shelf = Shelf()
        self._checker: SafetyChecker | None = None

    @property
    def resident(self) -> list[str]:
        """Names of the loaded bases, least recently used first."""
        return list(self._bases)

    def prepare(self, bases: Iterable[tuple[str, str, Path]]) -> None:
        """Load the safety checker, where it is installed, and of the bases, in their order, those that fit beside one
        another; the others come when they are asked for. Raises BaseModelError and SafetyError."""
        if self._safety_checker.is_dir():
            self._safety()
        else:
            logger.warning("The safety checker is not installed: requests need disable_safety_checker=true.")
        # One after the other: while a model is made, its libraries change torch for all threads.
        for name, family, path in bases:
            if self._bases and not self._fits(_bytes_of(path, default_dtype(self.device))):
                logger.info("%s will be loaded when it is asked for: memory is short", name)
            else:
                self.load(name, family, path)

    def load(self, name: str, family: str, path: Path) -> Family:
        """The base, loaded if need be; others leave the accelerator when its memory is short. Raises BaseModelError."""
        if name not in self._bases:
            dtype = default_dtype(self.device)
            self._make_room(name, _bytes_of(path, dtype))
            self._bases[name] = model = load_model(family, path, self.device, dtype)
            self._encode[name] = lru_cache(PROMPTS)(plain_encoder(model))
            logger.info("loaded %s from %s", name, path)
            if self._compiled:
                compile_blocks(model)
                logger.info("compiled %s's blocks", name)
        self._bases.move_to_end(name)
        return self._bases[name]

    def make(
        self,
        request: Request,
        loras: Mapping[str, Path],
        record: Record = lambda name, value: None,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        lent: Mapping[str, Borrowed] = MappingProxyType({}),
        again: Provenance | None = None,
    ) -> dict[int, Image.Image]:
        """{place in the batch: image}, without the images that the safety checker withholds. Raises KLoRAError.

        Each has its Provenance in info["provenance"].
        loras: files by input, "content_lora" and "style_lora". Without request.model the LoRAs choose the base.
        lent: by input, what more is known of a fetched file: where K-LoRA's scores of it may be kept, which are
        computed anew of others, and its triggers.  again: of an image to be made again, by LoRAs with these sha256 and
        triggers.
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
        sha256 = {name: self._sha256(name, path, lent.get(name)) for name, path in loras.items()}
        if again:
            again.check(sha256)
        checker = None if request.disable_safety_checker else self._safety()
        model = self.load(base, family, path)
        read, used, measured = {}, {}, {}
        for name, file in loras.items():
            facts = lent.get(name)
            read_lora = partial(_said_of, name, lambda path: model.read_lora(path).to(self.device))
            lora = self._shelf.take(base, file, read_lora, facts.scores if facts else None)
            logger.info("%s: %s", name, lora.report)
            triggers = again.triggers(name) if again else facts.triggers if facts else ()
            read[name.removesuffix("_lora")] = lora = _called(lora, triggers, request.prompt)
            reference = canonical(request.loras.get(name, file.name), fetched=facts is not None)
            used[name] = UsedLoRA(reference, sha256[name], lora.metadata.get("trigger", ""))

        def measure(name: str, value: Any) -> None:
            measured[name] = value
            record(name, value)

        images = generate(model, request, **read, encode=self._encode[base], record=measure, on_step=on_step)
        for name, facts in lent.items():
            keep_scores(facts.scores, read[name.removesuffix("_lora")])
        shown = _shown(images, checker)
        steps = request.num_inference_steps or model.steps
        made = Provenance.of(settled(request, base, steps, model.guidance_scale), path, used, measured)
        for place, image in shown.items():
            image.info["provenance"] = replace(made, place=place)
        return shown

    def _sha256(self, name: str, file: Path, facts: Borrowed | None) -> tuple[str, ...]:
        return _said_of(name, lambda path: self._shelf.sha256(path, facts.scores if facts else None), file)

    def _fits(self, needed: int) -> bool:
        return self._free(self.device) >= needed + HEADROOM_BYTES

    def _make_room(self, name: str, needed: int) -> None:
        """Let bases go until another fits. Raises BaseModelError, and lets none go, where that could not help."""
        within_reach = self._free(self.device) + sum(_held_by(model) for model in self._bases.values())
        if needed > within_reach:
            raise BaseModelError(
                f"{name} needs {needed / 1e9:.1f} GB of memory on {self.device}, where {within_reach / 1e9:.1f} GB can "
                "be had. Expected a larger device or a smaller base."
            )
        while self._bases and not self._fits(needed):
            leaving = self._bases.popitem(last=False)[0]
            del self._encode[leaving]
            logger.info("%s leaves %s: memory is short", leaving, self.device)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _safety(self) -> SafetyChecker:
        if self._checker is None:
            self._checker = SafetyChecker.load(self._safety_checker, self.device)
        return self._checker


def _bytes_of(path: Path, dtype: torch.dtype) -> int:
    """What a base takes when its parts are loaded in a dtype, whatever the one that their files are in."""
    try:
        return sum(file.stat().st_size + _growth(file, dtype) for file in files_read(path))
    except (OSError, SafetensorError):
        return 0  # load_model will say what is wrong with it


def _growth(file: Path, dtype: torch.dtype) -> int:
    """Bytes by which a file's tensors grow, or shrink, in a dtype."""
    sizes, grown = {"F32": 4, "F16": 2, "BF16": 2}, 0
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118, it is no mapping
            tensor = tensors.get_slice(key)
            grown += prod(tensor.get_shape()) * (dtype.itemsize - sizes.get(tensor.get_dtype(), dtype.itemsize))
    return grown


def _held_by(model: Family) -> int:
    modules = (part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module))
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def save_images(images: Mapping[int, Image.Image], folder: Path, request: Request) -> list[Path]:
    """Write klora_<seed + i>_<i>.<format>, i the place in the batch; what is returned is there. Each file tells how its
    image was made, where its info has a Provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    quality = None if request.output_format == "png" else request.output_quality
    paths = {index: folder / f"klora_{request.seed + index}_{index}.{request.output_format}" for index in images}

    def save(index: int) -> None:
        made = images[index].info.get("provenance")
        told = stamp(made, images[index].size, request.output_format) if made else {}
        images[index].save(paths[index], quality=quality, **told)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, images))
    return list(paths.values())


def _called(lora: LoRA, triggers: Sequence[str], prompt: str) -> LoRA:
    """With one of the words that its authority names, where its file names none: they stand for one another, so one
    that the prompt has, else the first."""
    if not triggers or lora.metadata.get("trigger"):
        return lora
    word = next((word for word in triggers if word.lower() in prompt.lower()), triggers[0])
    return replace(lora, metadata={**lora.metadata, "trigger": word})


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
