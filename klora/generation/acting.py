"""Which LoRAs of a request act, where, when and how strongly. Knows no prompt."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from klora.form.request import Request
from klora.fusion import Schedule, fuse
from klora.lora import LoRA, Plan

Record = Callable[[str, Any], Any]
"""(name, number) -> ignored. Told what a run measured: fuse_seconds, denoise_seconds, style_share, ..."""


class ActingLoRA(NamedTuple):
    """A LoRA that a request lets act. role: "content" or "style"."""

    role: str
    lora: LoRA
    scale: float


def combine(
    request: Request,
    steps: int,
    content: LoRA | None,
    style: LoRA | None,
    record: Record = lambda name, value: None,
    device: torch.device | None = None,
) -> Plan:
    """Which LoRA acts where and when in the denoiser. device: the denoiser's; LoRAs are scored there if it is a CUDA
    device, else where they lie. Raises RequestError."""
    request.check_roles([role for role, lora in (("content", content), ("style", style)) if lora is not None])
    if request.fusion == "klora" and content is not None and style is not None:
        schedule = Schedule.from_pattern(request.pattern, request.alpha, request.beta)
        fusion = fuse(content, style, device=device if device and device.type == "cuda" else None)
        wins = fusion.content_wins(schedule, steps, request.style_bias)
        record("gamma", fusion.gamma)
        return fusion.gated(wins, request.content_scale, request.style_scale)
    acting = acting_loras(request, content, style)
    return Plan.constant(tuple(lora for _, lora, _ in acting), tuple(scale for _, _, scale in acting))


def encoder_plan(acting: Sequence[ActingLoRA], encoder: str) -> Plan:
    """All of these act in a text encoder, at their scales: K-LoRA's choice is about denoising steps."""
    parts = tuple(lora.text_encoders.get(encoder, {}) for _, lora, _ in acting)
    return Plan.constant(parts, tuple(scale for _, _, scale in acting))


def acting_loras(request: Request, content: LoRA | None, style: LoRA | None) -> list[ActingLoRA]:
    """Those that this request lets act at all."""
    given = ("content", content, request.content_scale), ("style", style, request.style_scale)
    return [
        ActingLoRA(role, lora, scale)
        for role, lora, scale in given
        if lora is not None and request.fusion in (role, "sum", "klora")
    ]
