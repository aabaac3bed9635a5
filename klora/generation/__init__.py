"""From a request and up to two LoRAs to images: a pure function of its inputs. Knows no file, form or HTTP."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from klora.device import forget_peak, peak_bytes, synchronize
from klora.errors import RequestError
from klora.form.request import Request
from klora.fusion import style_share
from klora.generation.acting import Record, acting_loras, combine
from klora.generation.prompts import Draw, Encode, draws_of, encoded, has_word, plain_encoder
from klora.layers import attached
from klora.lora import LoRA, Plan
from klora.models.family import Conditioning, Family
from klora.models.pace import compiled_for, paced

__all__ = [
    "Draw",
    "Encode",
    "OnStep",
    "Record",
    "combine",
    "draws_of",
    "generate",
    "has_word",
    "plain_encoder",
    "refuse_unsupported",
]

OnStep = Callable[[int, int], None]
"""(i, steps) -> None: denoising has reached step i, or with i = steps its end."""


@torch.no_grad()
def generate(
    model: Family,
    request: Request,
    *,
    content: LoRA | None = None,
    style: LoRA | None = None,
    encode: Encode | None = None,
    record: Record = lambda name, value: None,
    on_step: OnStep = lambda step, steps: None,
    draws: Sequence[Draw] | None = None,
) -> list[Image.Image]:
    """Make request.num_outputs images in one batch; image i uses seed + i. draws: these instead, of which each has a
    prompt and a seed of its own, in one batch for each length of prompts.

    K-LoRA needs both LoRAs; one alone acts everywhere, none leaves the base as it is. The request's references are not
    fetched: a LoRA that it names has to be given. Sheets and reports are a Studio's. encode: plain_encoder(model), or
    what remembers its results. Raises RequestError for what this base cannot do, or the device has no memory for.
    """
    for name, lora in {"content": content, "style": style}.items():
        if lora is None and f"{name}_lora" in request.loras:
            raise RequestError(f"{name}_lora is named, but {name} is not given. Expected what model.read_lora() reads.")
    steps = _checked_steps(model, request)
    device = next(model.denoiser.parameters()).device
    forget_peak(device)
    lap = _stopwatch(device, record)
    images: dict[int, Image.Image] = {}
    try:
        plan = combine(request, steps, content, style, record, device)
        lap("fuse_seconds")
        draws = draws or draws_of(request, content, style, record)
        acting = acting_loras(request, content, style)
        batches = encoded(model, request, draws, acting, encode or plain_encoder(model))
        lap("encode_seconds")
        for places, conditioning in batches:
            seeds = [draws[place].seed for place in places]
            images |= zip(places, _drawn(model, request, plan, conditioning, seeds, lap, record, on_step), strict=True)
    except torch.OutOfMemoryError as error:
        raise RequestError(f"{device} has too little memory for these images. Ask for fewer, or smaller.") from error
    if peak := peak_bytes(device):
        record("peak_bytes", peak)
    return [images[place] for place in range(len(draws))]


def _drawn(
    model: Family,
    request: Request,
    plan: Plan,
    conditioning: Conditioning,
    seeds: Sequence[int],
    lap: Callable[[str], None],
    record: Record,
    on_step: OnStep,
) -> list[Image.Image]:
    """An image for each seed, in one batch; the plan's LoRAs are lent for so long."""
    steps = request.num_inference_steps or model.steps
    begun: tuple[int, int] | None = None  # the first step that runs, for an image a later one, and the flips until then
    fast = compiled_for(model, request)
    pixels = request.pixels(model.native_size, model.size_multiple)
    with (
        attached(model.denoiser, plan, alike=fast.alike, float8=fast.float8, pixels=pixels) as gate,
        paced(model, request, gate.engine) as (in_full, means),
    ):

        def reached(step: int) -> None:
            nonlocal begun
            before = gate.flips
            gate.set_step(step)
            in_full(gate.flips != before)  # what other LoRAs added is not what these would
            begun = begun or (step, gate.flips)
            if step == steps:
                lap("denoise_seconds")
            on_step(step, steps)

        images = model.sample(conditioning, request, reached, seeds)
    lap("decode_seconds")
    record("engine", gate.engine)
    first, unused = begun or (0, 0)
    record("flips", gate.flips - unused)
    record("flips_per_step", round((gate.flips - unused) / (steps - first), 2))
    if plan.content_wins is not None and (share := style_share(plan.content_wins[first:])) is not None:
        record("style_share", share)
    if request.go_fast:
        if gate.float8:
            means.append("float8 products")
        record("go_fast", ", ".join(means) or f"nothing makes this faster on {model.name}")
    return images


def refuse_unsupported(family: type[Family], request: Request) -> None:
    """Raise RequestError for what no base of a family can do, loaded or not."""
    multiple = family.size_multiple
    for name, side in zip(("width", "height"), request.size(multiple, multiple), strict=True):
        if side % multiple:
            raise RequestError(f"{name} is {side}. Expected a multiple of {multiple} on {family.name}.")
    if request.negative_prompt and not family.negative_prompts:
        raise RequestError(f"negative_prompt is given, but {family.name} takes none. Leave it empty, or use SDXL.")
    if request.scheduler and request.scheduler not in family.schedulers:
        raise RequestError(f"scheduler is {request.scheduler}, but {family.name} has its own. Leave it blank.")


def _checked_steps(model: Family, request: Request) -> int:
    """The number of steps, once all that this base cannot do is refused."""
    refuse_unsupported(type(model), request)
    steps = request.num_inference_steps or model.steps
    guidance = model.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if request.negative_prompt and guidance <= 1:
        raise RequestError(f"negative_prompt is given, but guidance_scale {guidance:g} heeds none. Raise it above 1.")
    if guidance and not model.guidance_scale:
        raise RequestError(f"guidance_scale is {guidance:g}, but this {model.name} takes none. Leave it blank.")
    if request.image is not None and int(steps * request.prompt_strength) < 1:
        raise RequestError(f"prompt_strength {request.prompt_strength} of {steps} steps is no step. Raise either.")
    return steps


def _stopwatch(device: torch.device, record: Record) -> Callable[[str], None]:
    """lap(name) records the seconds since the last lap, once the device has caught up, with those of the same name."""
    last, spent = time.perf_counter(), defaultdict[str, float](float)

    def lap(name: str) -> None:
        nonlocal last
        synchronize(device)
        last, before = time.perf_counter(), last
        spent[name] += last - before
        record(name, spent[name])

    return lap
