"""Ways to draw one image with LoRAs, to be timed side by side: without any, by stock diffusers and PEFT, by klora, and
by K-LoRA as the paper states it, with everything computed anew at every layer call.

A way is a context manager: entered, it has read its files and lent them to the base; left, the base is as it was.
Knows no command line, no table and no size of a base.   A [R, I], B [O, R], dW [O, I].
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from klora.device import forget_peak, peak_bytes, synchronize
from klora.errors import LoRAError
from klora.form.request import Request
from klora.fusion import Clock, Schedule, fuse
from klora.layers import Engine, Gate, attached
from klora.lora import LoRA, LowRank, Plan
from klora.models.family import Conditioning, Family
from klora.models.pace import compiled_for, paced

Lap = Callable[[str], None]
"""(name) -> None: what has happened since the last lap took so many seconds."""

OnStep = Callable[[int], Any]
"""(i) -> ignored: the denoiser is about to run step i."""

PHASES = {"cold_pair_seconds": 1.0, "warm_pair_seconds": 1.0, "scale_change_seconds": 0.8}
"""After reading, in this order: {what is timed: the scale of every LoRA}. Cold: from files just read to LoRAs that
could act, scoring included; warm: the same pair taken up anew, its scores known; then again with only another scale."""


@dataclass(frozen=True)
class Subject:
    """What every way draws with. files: the "content" and the "style" LoRA; conditioning: of the request's prompt."""

    model: Family
    files: Mapping[str, Path]
    conditioning: Conditioning
    request: Request

    @property
    def steps(self) -> int:
        return self.request.num_inference_steps or self.model.steps

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_pattern(self.request.pattern, self.request.alpha, self.request.beta)

    def read(self, *roles: str) -> tuple[LoRA, ...]:
        """The LoRAs of these roles, read now: no score of them is known."""
        return tuple(self.model.read_lora(self.files[role]) for role in roles)


Way = Callable[[Subject, Lap], AbstractContextManager[OnStep]]


@torch.no_grad()
def drawn(way: Way, subject: Subject) -> tuple[list[Image.Image], dict[str, float]]:
    """The images, and what they took: "load_seconds", PHASES as far as the way has them, "step_seconds" (the mean of a
    run, from its first step to its last), "image_seconds" (denoising and decoding), on CUDA "peak_bytes" (all that was
    allocated at a time, the base included)."""
    device, figures = subject.device, dict[str, float]()
    forget_peak(device)
    lap = _stopwatch(device, figures)
    with torch.compiler.set_stance("force_eager"), way(subject, lap) as on_step:

        def reached(step: int) -> None:
            if step == 0:
                lap("prepare")
            on_step(step)
            if step == subject.steps:
                lap("denoise")

        lap("enter")
        images = subject.model.sample(subject.conditioning, subject.request, reached)
        lap("decode")
    del figures["enter"]
    parts = {name: figures.pop(name) for name in ("prepare", "denoise", "decode")}
    figures |= {"step_seconds": parts["denoise"] / subject.steps, "image_seconds": sum(parts.values())}
    if peak := peak_bytes(device):
        figures["peak_bytes"] = peak
    return images, figures


def _stopwatch(device: torch.device, figures: dict[str, float]) -> Lap:
    """lap(name) leaves the seconds since the last lap in figures, once the device has caught up."""
    synchronize(device)
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        synchronize(device)
        last, before = time.perf_counter(), last
        figures[name] = last - before

    return lap


# The ways


@contextmanager
def bare(subject: Subject, lap: Lap) -> Iterator[OnStep]:
    """The base without any LoRA, as klora runs it."""
    with paced(subject.model, subject.request):
        yield lambda step: None


@contextmanager
def stock(subject: Subject, lap: Lap) -> Iterator[OnStep]:
    """The base without any LoRA, as diffusers runs it."""
    yield lambda step: None


@contextmanager
def peft(subject: Subject, lap: Lap, *, roles: tuple[str, ...]) -> Iterator[OnStep]:
    """Stock diffusers: each file an adapter of PEFT's, all of them active."""
    pipe = subject.model.pipe
    try:
        for role in roles:
            pipe.load_lora_weights(subject.files[role], adapter_name=role)
        lap("load_seconds")
        for phase, scale in PHASES.items():
            pipe.set_adapters(list(roles), [scale] * len(roles))
            lap(phase)
        pipe.set_adapters(list(roles), [1.0] * len(roles))
        yield lambda step: None
    finally:
        pipe.unload_lora_weights()


@contextmanager
def constant(subject: Subject, lap: Lap, *, roles: tuple[str, ...], engine: Engine) -> Iterator[OnStep]:
    """One LoRA, or the sum of both, by klora."""
    loras = subject.read(*roles)
    lap("load_seconds")

    def lent(scale: float) -> AbstractContextManager[Gate]:
        return attached(subject.model.denoiser, Plan.constant(loras, (scale,) * len(loras)), engine=engine)

    with _through_phases(lent, lap) as gate, paced(subject.model, subject.request):
        yield gate.set_step


@contextmanager
def klora(
    subject: Subject, lap: Lap, *, engine: Engine, clock: Clock = "step", go_fast: bool = False
) -> Iterator[OnStep]:
    """K-LoRA by klora. Another scale is a request of its own, as for a server: all but the scores is done again."""
    content, style = subject.read("content", "style")
    lap("load_seconds")

    def lent(scale: float) -> AbstractContextManager[Gate]:
        fusion = fuse(content, style, device=subject.device)
        plan = fusion.plan(subject.schedule, steps=subject.steps, content_scale=scale, style_scale=scale, clock=clock)
        return attached(subject.model.denoiser, plan, engine=engine, alike=fast.alike, float8=fast.float8)

    request = replace(subject.request, go_fast=go_fast)
    fast = compiled_for(subject.model, request)
    with _through_phases(lent, lap) as gate, paced(subject.model, request, engine) as (in_full, _):

        def on_step(step: int) -> None:
            before = gate.flips
            gate.set_step(step)
            in_full(gate.flips != before)

        yield on_step


@contextmanager
def _through_phases(lent: Callable[[float], AbstractContextManager[Gate]], lap: Lap) -> Iterator[Gate]:
    """Lend at each phase's scale, then at 1. A phase's seconds include the giving back of what was lent before it."""
    for phase, scale in PHASES.items():
        with lent(scale):
            lap(phase)
    with lent(1.0) as gate:
        yield gate


@contextmanager
def naive(subject: Subject, lap: Lap) -> Iterator[OnStep]:
    """K-LoRA by recomputing(). It knows nothing of a pair beforehand but gamma, and takes no scale."""
    content, style = subject.read("content", "style")
    lap("load_seconds")
    with recomputing(subject.model.denoiser, content, style, subject.schedule, subject.steps):
        lap("cold_pair_seconds")
        yield lambda step: None


@contextmanager
def recomputing(
    denoiser: nn.Module, content: Mapping[str, LowRank], style: Mapping[str, LowRank], schedule: Schedule, steps: int
) -> Iterator[None]:
    """K-LoRA as the paper states it (arXiv:2502.18461, Eq 1-10): at every call of an adapted layer both dense updates,
    the K largest magnitudes of each, the choice, and a product with the chosen update.

    tau counts layer calls, 1, 2, ... modulo steps * layers, and gamma is the trimmed mean of the layers' L1 ratios, as
    in the published code. Dense updates and their products are in float32, as there, where no .half() reaches them.
    Raises LoRAError when one of the LoRAs adapts a layer that the other does not.
    """
    if alone := content.keys() ^ style.keys():
        raise LoRAError(f"{sorted(alone)[0]!r} is adapted by one LoRA only. Expected two that adapt the same layers.")
    linears: dict[str, Any] = {name: denoiser.get_submodule(name) for name in content}  # Any: get_submodule's type
    pairs = {name: [_like(linear.weight, lora[name]) for lora in (content, style)] for name, linear in linears.items()}
    gamma = _trimmed_mean_ratio(pairs.values())
    calls, all_calls = 0, steps * len(pairs)

    def chosen(content: LowRank, style: LowRank) -> Tensor:
        nonlocal calls
        calls += 1
        scale = schedule.alpha * (calls % all_calls / all_calls) + schedule.beta
        scale = scale % schedule.alpha if schedule.wraps else scale
        updates = [pair.B @ pair.A for pair in (content, style)]
        k = min(content.rank * style.rank, updates[0].numel())
        content_score, style_score = (dW.abs().flatten().topk(k).values.sum(dtype=torch.float64) for dW in updates)
        return updates[0] if content_score > scale * gamma * style_score else updates[1]

    def with_update(pair: list[LowRank]) -> Callable[..., Tensor]:
        return lambda linear, args, output: output + F.linear(args[0].float(), chosen(*pair)).to(output.dtype)

    hooks = [linear.register_forward_hook(with_update(pairs[name])) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _like(weight: Tensor, pair: LowRank) -> LowRank:
    return LowRank(pair.A.to(weight.device, torch.float32), pair.B.to(weight.device, torch.float32))


def _trimmed_mean_ratio(pairs: Any) -> float:
    """gamma of [content, style] pairs: the mean of their L1 ratios, without those of at least 3 times the mean."""
    l1 = [[(pair.B @ pair.A).abs().sum(dtype=torch.float64).item() for pair in both] for both in pairs]
    ratios = torch.tensor([content / style for content, style in l1], dtype=torch.float64)
    return ratios[ratios < 3 * ratios.mean()].mean().item()


ONE, BOTH = ("content",), ("content", "style")
WAYS: dict[str, Way] = {
    "bare base": bare,
    "bare base, diffusers": stock,
    "one LoRA, PEFT": partial(peft, roles=ONE),
    "sum, PEFT": partial(peft, roles=BOTH),
    "one LoRA": partial(constant, roles=ONE, engine="merged"),
    "sum": partial(constant, roles=BOTH, engine="merged"),
    "K-LoRA, gated": partial(klora, engine="gated"),
    "K-LoRA, merged": partial(klora, engine="merged"),
    "K-LoRA, gated, go_fast": partial(klora, engine="gated", go_fast=True),
    "K-LoRA, go_fast": partial(klora, engine="merged", go_fast=True),
    "K-LoRA, naive": naive,
}
"""By what a row is called. The first is what the others are compared with; a line more is a row more."""
