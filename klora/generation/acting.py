"""Which LoRAs of a request act, where, when and how strongly. Knows no prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from klora.form.request import Request
from klora.fusion import Schedule, fuse
from klora.lora import LoRA, Plan

Record = Callable[[str, Any], Any]
"""(name, number) -> ignored. Told what a run measured: fuse_seconds, denoise_seconds, style_share, ..."""

Able = tuple[str, LoRA, float]
"""(role, LoRA, scale) of what may act."""


def combine(
    request: Request,
    steps: int,
    content: LoRA | None,
    style: LoRA | None,
    record: Record = lambda name, value: None,
    device: torch.device | None = None,
) -> Plan:
    """Who acts where and when in the denoiser. device: the denoiser's, where LoRAs are scored if it is a CUDA one;
    otherwise they are scored where they lie. Raises RequestError."""
    request.check_roles([role for role, lora in (("content", content), ("style", style)) if lora is not None])
    if request.fusion == "klora" and content is not None and style is not None:
        schedule = Schedule.from_pattern(request.pattern, request.alpha, request.beta)
        fusion = fuse(content, style, device=device if device and device.type == "cuda" else None)
        wins = fusion.content_wins(schedule, steps, request.style_bias)
        record("gamma", fusion.gamma)
        return fusion.gated(wins, request.content_scale, request.style_scale)
    return constant(acting(request, content, style))


def constant(able: Sequence[Able], encoder: str | None = None) -> Plan:
    """All of these act, at their scales: in the denoiser without K-LoRA's choice, or in a text encoder, which is
    outside the choice because that is about denoising steps."""
    parts = tuple(lora.text_encoders.get(encoder, {}) if encoder else lora for _, lora, _ in able)
    return Plan.constant(parts, tuple(scale for _, _, scale in able))


def acting(request: Request, content: LoRA | None, style: LoRA | None) -> list[Able]:
    """Those that this request lets act at all."""
    found = []
    for name, lora, scale in (("content", content, request.content_scale), ("style", style, request.style_scale)):
        if lora is not None and request.fusion in (name, "sum", "klora"):
            found.append((name, lora, scale))
    return found
