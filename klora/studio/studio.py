"""Bases kept ready, and requests turned into images: what predict.py and the `klora` command share.

Knows no form, no HTTP and no environment. Between requests it remembers loaded bases and LoRAs, nothing else.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from PIL import Image

from klora.cache import Borrowed
from klora.device import default_device, free_bytes
from klora.errors import LoRAError, SafetyError
from klora.files.report import stated_alphas
from klora.files.shelf import Shelf
from klora.form.request import Request
from klora.fusion import Fusion, Schedule, fuse
from klora.generation import Draw, OnStep, Record, draws_of, generate, has_word, refuse_unsupported
from klora.interruptible import in_threads
from klora.lora import LoRA
from klora.models import FAMILIES, origin_of
from klora.models.family import Family
from klora.models.safety import SafetyChecker
from klora.report import Report, report_on
from klora.report.numbers import Counts
from klora.studio.bases import Products, ResidentBases
from klora.studio.provenance import Check, Place, Provenance, UsedLoRA, canonical, settled, stamp
from klora.studio.sheets import contact_sheet, draw_ways, tallied, ways_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

FindBase = Callable[[str | None, str | None, str], tuple[str, str, Path]]
"""(a base's name or None, the family that the LoRAs need or None, the base that one of them or its page names or "") ->
(the base's name, key of FAMILIES, folder)."""


class Studio:
    """Loaded bases and the safety checker, and what is made with them. compiled: how the blocks multiply that prepare()
    compiles for go_fast, which takes minutes; None compiles none."""

    def __init__(
        self,
        find_base: FindBase,
        safety_checker: Path,
        device: torch.device | None = None,
        free: Callable[[torch.device], int] = free_bytes,
        *,
        compiled: Products | None = None,
    ) -> None:
        self.device = device or default_device()
        self._find_base, self._safety_checker = find_base, safety_checker
        self._shelf = Shelf()
        self._bases = ResidentBases(self.device, free, compiled=compiled, spare=self._shelf.clear)
        self._checker: SafetyChecker | None = None

    @property
    def resident(self) -> list[str]:
        """Names of the loaded bases, least recently used first."""
        return self._bases.names

    def prepare(self, bases: Iterable[tuple[str, str, Path]]) -> None:
        """Load the safety checker, if it is installed, and of the bases, in their order, those that fit together. The
        others come when they are asked for. Raises BaseModelError and SafetyError."""
        if self._safety_checker.is_dir():
            self._safety()
        else:
            logger.warning("The safety checker is not installed: requests need disable_safety_checker=true.")
        self._bases.prepare(bases)

    def load(self, name: str, family: str, path: Path) -> Family:
        """The base, loaded if need be; others leave the accelerator when its memory is short. Raises BaseModelError."""
        return self._bases.load(name, family, path)

    def make(
        self,
        request: Request,
        files: Mapping[str, Borrowed],
        record: Record = lambda name, value: None,
        on_step: OnStep = lambda step, steps: None,
        again: Provenance | None = None,
    ) -> dict[Place, Image.Image]:
        """{place in the batch: image}, without the images that the safety checker withholds, or {name: contact sheet}
        of the sheets that are asked for. Raises KLoRAError.

        Each has its Provenance in info["provenance"].
        files: the LoRAs by input, "content_lora" and "style_lora". Without request.model they choose the base.  again:
        the record of an image to be made again, which states the sha256 and the triggers of its LoRAs.
        """
        ready = self._ready(request, files, again)
        measured = dict[str, Any]()

        def measure(name: str, value: Any) -> None:
            measured[name] = value
            record(name, value)

        record_image = tallied(measure) if request.sheets else measure

        def draw(request: Request, on_step: OnStep) -> list[Image.Image]:
            return self._drawn(request, ready, ready.draws(request, record_image), record_image, on_step)

        lines = [f"{role}_lora: {lora.report}" for role, lora in ready.loras.items()] + request.remarks(ready.loras)
        if len(ready.loras) == 2 and request.fusion == "klora":
            report = ready.report(request)
            lines += [report.summary(), *report.advised]
            measure("fusion", report.summary())
        for line in lines:
            logger.info("%s", line)
        if request.sheets:
            shown = _sheets(request, ready, lambda way, on_step: draw(way, on_step)[0], on_step)
        else:
            shown = _shown(draw(request, on_step), ready.checker)
        self._keep_scores(files, ready)
        provenance = Provenance.of(ready.settled(request), ready.path, ready.used, measured)
        for place, image in shown.items():
            image.info["provenance"] = replace(provenance, place=place)
        return shown

    def draw(self, requests: Sequence[Request], files: Mapping[str, Borrowed], check: Check) -> dict[int, Image.Image]:
        """{place: image} of requests for one image each, which agree in all but prompt and seed and are drawn together;
        without the images that the safety checker withholds. Arguments and errors as make(), and what check raises.

        Each has its Provenance in info["provenance"], as if it were drawn alone, and its prompt with the trigger words
        in info["caption"].
        """
        first = self._ready(requests[0], files)
        check(first.used)
        by_prompt = any(file.triggers for file in files.values())  # which of several triggers a LoRA is called by
        ready = [first, *(self._ready(each, files) if by_prompt else first for each in requests[1:])]
        draws = [each.draws(request)[0] for request, each in zip(requests, ready, strict=True)]
        measured = dict[str, Any]()
        images = self._drawn(requests[0], first, draws, measured.__setitem__, lambda step, steps: None)
        self._keep_scores(files, first)
        shared = Provenance.of(first.settled(requests[0]), first.path, first.used, measured)
        for request, each, draw, image in zip(requests, ready, draws, images, strict=True):
            inputs = {**shared.inputs, "prompt": request.prompt, "seed": request.seed}
            image.info |= {"provenance": replace(shared, inputs=inputs, loras=each.used), "caption": draw.prompt}
        return _passed(images, first.checker)

    def _drawn(
        self, request: Request, ready: "_Ready", draws: Sequence[Draw], record: Record, on_step: OnStep
    ) -> list[Image.Image]:
        encode = self._bases.encoder(ready.base)
        return generate(ready.model, request, **ready.loras, encode=encode, record=record, on_step=on_step, draws=draws)

    def report(self, request: Request, files: Mapping[str, Borrowed]) -> Report:
        """What K-LoRA does with a request's pair, whose images it does not make. Arguments and errors as make()."""
        alphas = {name.removesuffix("_lora"): stated_alphas(file.path) for name, file in files.items()}
        return self._ready(request, files).report(request, alphas)

    def _ready(self, request: Request, files: Mapping[str, Borrowed], again: Provenance | None = None) -> "_Ready":
        """The base, loaded, and the LoRAs, read for it. Arguments and errors as make()."""
        base, family, path = self._base_for(request, files)
        refuse_unsupported(FAMILIES[family], request)  # before a base is loaded for it
        sha256 = {name: _for_input(name, self._shelf.sha256, file.path, file.scores) for name, file in files.items()}
        if again:
            again.check(sha256)
        checker = None if request.disable_safety_checker else self._safety()
        model = self.load(base, family, path)
        loras, used = {}, {}
        for name, file in files.items():
            read_lora = partial(_for_input, name, lambda path: model.read_lora(path).to(self.device))
            lora = self._shelf.take(base, file.path, read_lora, file.scores)
            trigger = again.loras[name].trigger if again else _trigger(lora, file.triggers, request.prompt)
            loras[name.removesuffix("_lora")] = replace(lora, metadata={**lora.metadata, "trigger": trigger})
            reference = canonical(request.loras.get(name, file.path.name), fetched=file.scores is not None)
            used[name] = UsedLoRA(reference, sha256[name], trigger)
        return _Ready(base, path, model, loras, used, checker)

    def _keep_scores(self, files: Mapping[str, Borrowed], ready: "_Ready") -> None:
        for name, file in files.items():
            if file.scores:
                self._shelf.keep(file.scores, ready.loras[name.removesuffix("_lora")])

    def _base_for(self, request: Request, files: Mapping[str, Borrowed]) -> tuple[str, str, Path]:
        """What FindBase gives. Raises LoRAError where a LoRA was made for another family."""
        origins = {name: _for_input(name, self._shelf.origin, file.path, origin_of) for name, file in files.items()}
        made_for = {name: origin for name, origin in origins.items() if origin}
        needed = next((origin.family for origin in made_for.values() if origin.family), None)
        named = [(origin and origin.base) or files[name].base for name, origin in origins.items()]
        base, family, path = self._find_base(request.model, needed, next(filter(None, named), ""))
        for name, origin in made_for.items():
            if origin.family != family:
                seen = f"{name} was made for {origin}, but this request runs {base}"
                raise LoRAError(f"{seen}. Expected one for {FAMILIES[family].name}.")
        return base, family, path

    def _safety(self) -> SafetyChecker:
        self._checker = self._checker or SafetyChecker.load(self._safety_checker, self.device)
        return self._checker


@dataclass(frozen=True)
class _Ready:
    """What a request runs on.  path: the base's folder; loras: by role, "content" and "style"; used: by input, with
    "_lora" after that; checker: None where the request wants none."""

    base: str
    path: Path
    model: Family
    loras: Mapping[str, LoRA]
    used: Mapping[str, UsedLoRA]
    checker: SafetyChecker | None

    def steps(self, request: Request) -> int:
        """The number of steps of the full schedule."""
        return request.num_inference_steps or self.model.steps

    def settled(self, request: Request) -> Request:
        """The request with the defaults filled in that the base decides."""
        return settled(request, self.base, self.steps(request), self.model.guidance_scale)

    def draws(self, request: Request, record: Record = lambda name, value: None) -> list[Draw]:
        """The prompt and the seed of each image of a batch."""
        return draws_of(request, self.loras.get("content"), self.loras.get("style"), record)

    def fusion(self) -> Fusion:
        """Both LoRAs scored against each other, once: they remember their scores."""
        return fuse(self.loras["content"], self.loras["style"])

    def report(self, request: Request, alphas: Mapping[str, Counts] = MappingProxyType({})) -> Report:
        """What K-LoRA does with both LoRAs. alphas: as report_on() takes them."""
        schedule = Schedule.from_pattern(request.pattern, request.alpha, request.beta)
        return report_on(self.fusion(), schedule, self.steps(request), request.style_bias, alphas=alphas)


def save_images(images: Mapping[Place, Image.Image], folder: Path, request: Request) -> list[Path]:
    """Write klora_<seed + i>_<i>.<format>, i the place in the batch, or klora_<seed>_<name>.<format> of a contact
    sheet; what is returned is there. Each file tells how its image was made, where its info has a Provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = {place: request.seed + place if isinstance(place, int) else request.seed for place in images}
    paths = {place: folder / f"klora_{seeds[place]}_{place}.{request.output_format}" for place in images}

    def save(place: Place) -> None:
        provenance = images[place].info.get("provenance")
        metadata = stamp(provenance, images[place].size, request.output_format) if provenance else {}
        images[place].save(paths[place], quality=request.output_quality, **metadata)

    in_threads(save, images)
    return list(paths.values())


def _trigger(lora: LoRA, listed: Sequence[str], prompt: str) -> str:
    """The word that calls a LoRA: what its file states, else of the triggers listed on its page the first that the
    prompt has, else the first; "" for none."""
    in_prompt = [word for word in listed if has_word(prompt, word, lora)]
    return next(filter(None, (lora.metadata.get("trigger"), *in_prompt, *listed)), "")


def _for_input(name: str, read: Callable[..., T], *arguments: Any) -> T:
    """read(*arguments), with the name of the input in front of a LoRAError's text."""
    try:
        return read(*arguments)
    except LoRAError as error:
        raise LoRAError(f"{name}: {error}") from error


def _passed(images: Sequence[Image.Image], checker: SafetyChecker | None) -> dict[int, Image.Image]:
    flags = checker.flagged(list(images)) if checker else [False] * len(images)
    return {place: image for place, (image, flag) in enumerate(zip(images, flags, strict=True)) if not flag}


def _shown(images: Sequence[Image.Image], checker: SafetyChecker | None) -> dict[Place, Image.Image]:
    passed = _passed(images, checker)
    withheld = ", ".join(str(place) for place in range(len(images)) if place not in passed)
    if not passed:
        raise SafetyError(
            f"The safety checker withheld every image ({withheld}). "
            "Try another prompt or seed, or set disable_safety_checker=true."
        )
    if withheld:
        logger.warning("The safety checker withheld these images of the batch: %s.", withheld)
    return {place: image for place, image in passed.items()}  # noqa: C416, of the places' wider type


def _sheets(
    request: Request, ready: _Ready, draw: Callable[[Request, OnStep], Image.Image], on_step: OnStep
) -> dict[Place, Image.Image]:
    """{name: contact sheet}, blank where the safety checker withholds an image. Raises SafetyError if it does all."""
    ways = ways_of(request, ready.fusion(), ready.steps(request))
    images = draw_ways([way for cells in ways.values() for way in cells], draw, on_step)
    shown = _shown(list(images.values()), ready.checker)
    passed = {decision: image for place, (decision, image) in enumerate(images.items()) if place in shown}
    return {name: contact_sheet(cells, passed) for name, cells in ways.items()}
