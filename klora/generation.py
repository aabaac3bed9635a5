"""From a request and up to two LoRAs to images: a pure function of its inputs. Knows no file, form or HTTP."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from klora.device import forget_peak, peak_bytes, synchronize
from klora.errors import RequestError
from klora.form.request import Request
from klora.fusion import Schedule, fuse
from klora.layers import attached
from klora.lora import LoRA, Plan, Words
from klora.models.family import Conditioning, Family
from klora.models.pace import paced
from klora.words import spoken, taught

Record = Callable[[str, Any], Any]
"""(name, number) -> ignored. Told what a run measured: fuse_seconds, denoise_seconds, style_share, ..."""

Encode = Callable[[str, str], Conditioning]
"""(prompt, negative prompt, "" for none) -> what the denoiser reads."""


class Draw(NamedTuple):
    """What sets an image apart from the others of its batch. prompt: with the trigger words."""

    prompt: str
    seed: int


@torch.no_grad()
def generate(
    model: Family,
    request: Request,
    *,
    content: LoRA | None = None,
    style: LoRA | None = None,
    encode: Encode | None = None,
    record: Record = lambda name, value: None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    draws: Sequence[Draw] | None = None,
) -> list[Image.Image]:
    """Make request.num_outputs images in one batch; image i uses seed + i. draws: these instead, of which each has a
    prompt and a seed of its own.

    K-LoRA needs both LoRAs; one alone acts everywhere, none leaves the base as it is. encode: plain_encoder(model), or
    what remembers its results. on_step(i, steps) is called as denoising reaches step i, and with i = steps at its end.
    Raises RequestError for what this base cannot do.
    """
    steps = _checked_steps(model, request)
    device = next(model.denoiser.parameters()).device
    forget_peak(device)
    lap = _stopwatch(device, record)
    plan = combine(request, steps, content, style, record, device)
    lap("fuse_seconds")
    draws = draws or draws_of(request, content, style, record)
    if any(lora.text_encoders or lora.words for _, lora, _ in _acting(request, content, style)):
        conditioning = _encoded_with_loras(model, request, draws, content, style)
    else:
        conditioning = _encoded(encode or plain_encoder(model), draws, request.negative_prompt)
    lap("encode_seconds")
    begun: tuple[int, int] | None = None  # the first step that runs, for an image a later one, and the flips until then
    with attached(model.denoiser, plan) as gate, paced(model, request) as (in_full, means):

        def reached(step: int) -> None:
            nonlocal begun
            before = gate.flips
            gate.set_step(step)
            in_full(gate.flips != before)  # what other LoRAs added is not what these would
            begun = begun or (step, gate.flips)
            if step == steps:
                lap("denoise_seconds")
            on_step(step, steps)

        images = model.sample(conditioning, request, reached, [draw.seed for draw in draws])
    lap("decode_seconds")
    record("engine", gate.engine)
    first, unused = begun or (0, 0)
    record("flips", gate.flips - unused)
    record("flips_per_step", round((gate.flips - unused) / (steps - first), 2))
    if plan.content_wins is not None:
        record("style_share", 1 - plan.content_wins[first:].double().mean().item())
    if peak := peak_bytes(device):
        record("peak_bytes", peak)
    if request.go_fast:
        record("go_fast", " and ".join(means) or f"nothing makes this faster on {model.name}")
    return images


def plain_encoder(model: Family) -> Encode:
    """How a prompt is encoded that no LoRA's word or part of a text encoder has to do with."""
    return lambda prompt, negative: model.encode_prompt([prompt], [negative] if negative else None)


def _encoded(encode: Encode, draws: Sequence[Draw], negative: str) -> Conditioning:
    """A row for each draw, or one for all where they share a prompt. Each prompt is read once, and by itself, so that
    it is read as it would be alone."""
    read = {prompt: encode(prompt, negative) for prompt in dict.fromkeys(draw.prompt for draw in draws)}
    first = read[draws[0].prompt]
    return first if len(read) == 1 else {name: torch.cat([read[draw.prompt][name] for draw in draws]) for name in first}


def _encoded_with_loras(
    model: Family, request: Request, draws: Sequence[Draw], content: LoRA | None, style: LoRA | None
) -> Conditioning:
    with ExitStack() as loans:
        for component, encoder in model.text_encoders.items():
            loans.enter_context(attached(encoder, _constant(request, content, style, component)))
        written = loans.enter_context(taught(model.pipe, _words(request, draws, content, style)))
        said = [Draw(written(draw.prompt), draw.seed) for draw in draws]
        return _encoded(plain_encoder(model), said, written(request.negative_prompt))


def combine(
    request: Request,
    steps: int,
    content: LoRA | None,
    style: LoRA | None,
    record: Record = lambda name, value: None,
    device: torch.device | None = None,
) -> Plan:
    """Who acts where and when in the denoiser. device: the denoiser's, where LoRAs are scored if it is a CUDA one;
    otherwise they are scored where they lie."""
    if request.fusion == "klora" and content is not None and style is not None:
        schedule = Schedule.from_pattern(request.pattern, request.alpha, request.beta)
        fusion = fuse(content, style, device=device if device and device.type == "cuda" else None)
        wins = fusion.content_wins(schedule, steps, request.style_bias)
        record("gamma", fusion.gamma)
        return fusion.gated(wins, request.content_scale, request.style_scale)
    return _constant(request, content, style)


def _constant(request: Request, content: LoRA | None, style: LoRA | None, encoder: str | None = None) -> Plan:
    """The LoRAs that act, at their scales: in the denoiser without K-LoRA's choice, or in a text encoder, which is
    outside the choice because that is about denoising steps."""
    acting = _acting(request, content, style)
    parts = tuple(lora.text_encoders.get(encoder, {}) if encoder else lora for _, lora, _ in acting)
    return Plan.constant(parts, tuple(scale for _, _, scale in acting))


def _acting(request: Request, content: LoRA | None, style: LoRA | None) -> list[tuple[str, LoRA, float]]:
    """(role, LoRA, scale) of those that this request lets act at all."""
    acting = []
    for name, lora, scale in (("content", content, request.content_scale), ("style", style, request.style_scale)):
        if request.fusion == name and lora is None:
            raise RequestError(f"fusion is {name} but {name}_lora is not given. Give it, or choose another fusion.")
        if lora is not None and request.fusion in (name, "sum", "klora"):
            acting.append((name, lora, scale))
    return acting


def draws_of(
    request: Request, content: LoRA | None, style: LoRA | None, record: Record = lambda name, value: None
) -> list[Draw]:
    """As many seeds as there are outputs, and the prompt with the trigger words that the LoRAs' files name where it
    lacks them: the subject's in front, the style's behind."""
    prompt, added = request.prompt, []
    for _, lora, _ in _acting(request, content, style) if request.add_triggers else ():
        trigger = lora.metadata.get("trigger", "")
        if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", prompt, re.IGNORECASE):
            added.append(trigger)
            styled = lora.metadata.get("lora_type") == "style"
            prompt = f"{prompt}, {trigger} style" if styled else f"{trigger}, {prompt}"
    if added:
        record("triggers_added", ", ".join(added))
    return [Draw(prompt, request.seed + i) for i in range(request.num_outputs)]


def _words(request: Request, draws: Sequence[Draw], content: LoRA | None, style: LoRA | None) -> Words:
    """The words that the acting LoRAs teach the text encoders, also as content:WORD and style:WORD. Raises RequestError
    where a prompt has a word that both teach."""
    bare: dict[str, Mapping[str, Tensor]] = {}
    qualified: dict[str, Mapping[str, Tensor]] = {}
    for role, lora, _ in _acting(request, content, style):
        for word, parts in lora.words.items():
            said = (request.negative_prompt, *(draw.prompt for draw in draws))
            if word in bare and any(map(spoken([word]).search, said)):
                raise RequestError(
                    f"Both LoRAs teach the word {word!r}. Write content:{word} or style:{word} in the prompt."
                )
            bare[word] = qualified[f"{role}:{word}"] = parts
    return bare | qualified


def _checked_steps(model: Family, request: Request) -> int:
    """The number of steps, once all that this base cannot do is refused."""
    steps = request.num_inference_steps or model.steps
    width, height = request.size(model.native_size, model.size_multiple)
    if width % model.size_multiple or height % model.size_multiple:
        raise RequestError(
            f"The size is {width}x{height}. Expected multiples of {model.size_multiple} on {model.name}."
        )
    if request.negative_prompt and not model.negative_prompts:
        raise RequestError(f"negative_prompt is given, but {model.name} takes none. Leave it empty, or use SDXL.")
    guidance = model.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if request.negative_prompt and guidance <= 1:
        raise RequestError(f"negative_prompt is given, but guidance_scale {guidance:g} heeds none. Raise it above 1.")
    if request.scheduler and request.scheduler not in model.schedulers:
        raise RequestError(f"scheduler is {request.scheduler}, but {model.name} has its own. Leave it blank.")
    if request.image is not None and int(steps * request.prompt_strength) < 1:
        raise RequestError(f"prompt_strength {request.prompt_strength} of {steps} steps is no step. Raise either.")
    return steps


def _stopwatch(device: torch.device, record: Record) -> Callable[[str], None]:
    """lap(name) records the seconds since the last lap, once the device has caught up."""
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        synchronize(device)
        last, before = time.perf_counter(), last
        record(name, last - before)

    return lap
