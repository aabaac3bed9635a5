"""Lend low-rank updates to a module tree for the length of a `with` block. The only code that touches one.

All LoRAs are stacked along the rank, and each row of the rank has a gate, which is its LoRA's at this step:

    y = W x + b + B (g * A) x        A = [A_1; A_2; ...]  [R, I]     B = [B_1, B_2, ...]  [O, R]     g  [R, 1]

Two engines, equal up to rounding:   gated   computes that formula; needs little memory, works on any base weight.
                                     merged  gives each touched layer an active weight W + B diag(g) A, rewritten only
                                             where g changed and always from the pristine W; costs nothing per step.

Knows no fusion, no pipeline and no file. The base's own parameters are never written to.
O outputs, I inputs, R sum of the LoRAs' ranks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, get_args

import torch
from torch import nn

from klora.device import free_bytes
from klora.errors import RequestError
from klora.layers.engines import Engine, Gate, LazyDict, LoRALinear, lend_gated, lend_linear, lend_merged
from klora.layers.float8 import takes_float8
from klora.layers.loans import clear, lend, lending
from klora.layers.pairs import compute_dtype, extended, linear_in, padded, pairs_of, placed
from klora.lora import Plan

__all__ = [
    "HEADROOM_BYTES", "Engine", "Gate", "LoRALinear", "Planner", "attached", "clear", "headroom_bytes", "lend",
    "lend_linear", "lending", "takes_float8",
]  # fmt: skip
HEADROOM_BYTES = 6 << 30  # left free by the merged engine: activations of a batch of four at 1024 px, and the VAE


def headroom_bytes(pixels: int) -> int:
    """Memory to leave free for drawing images of so many pixels: in proportion to them, from 1024 x 1024 on."""
    return HEADROOM_BYTES * max(pixels, 1 << 20) >> 20


class Planner(Protocol):
    """What makes a Plan from a schedule, as a Fusion does."""

    def plan(self, *schedule: Any, **options: Any) -> Plan: ...  # Any: their types are known to the planner alone


@contextmanager
def attached(
    denoiser: nn.Module,
    lora: Plan | Planner,
    schedule: Any = None,
    *,
    engine: Engine | None = None,
    alike: Iterable[str] = (),
    float8: Iterable[str] = (),
    pixels: int = 0,
    **options: Any,
) -> Iterator[Gate]:
    """Lend LoRAs to a module: `attached(unet, fusion, schedule, steps=50)`, or `attached(unet, plan)`.

    Yields a Gate, at step 0; gate.set_step(i) moves it. On leaving, by whatever exception, every module and parameter
    is back; until then the denoiser's state_dict() is not the base's.

    schedule, options: what a Planner's plan() takes; a Plan needs none.   engine: None takes merged where a copy of the
    touched weights fits in memory and can stand in their place, else gated.   pixels: of an image, for which the choice
    leaves headroom_bytes().
    alike: names of linears that the gated engine replaces, adapted or not, all at one rank, so that what was compiled
    with one pair of LoRAs serves every other.   float8: names of linears whose product the merged engine computes in
    float8, adapted or not: faster, and no longer equal to gated.
    Raises LoRAError when a layer is not a linear of the module or has another shape, and RequestError for an unknown
    engine, or for merged on a base that is quantised or that diffusers offloads in groups.
    """
    if engine not in (None, *get_args(Engine)):
        raise RequestError(f"engine is {engine!r}. Expected 'gated', 'merged' or None, for the one that fits.")
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # of what torch.compile() made
    requested = lora if isinstance(lora, Plan) else lora.plan(schedule, **options)
    alike, float8 = tuple(alike), dict.fromkeys(float8)
    plan = extended(requested, float8) if float8 else requested
    linears = [linear_in(denoiser, name) for name in plan.layers]
    obstacle = _obstacle(denoiser, linears)
    if engine == "merged" and obstacle:
        raise RequestError(f"engine is 'merged', but the base is {obstacle}. Expected 'gated', or None.")
    fits = not obstacle and _fits(linears, [name in float8 for name in plan.layers], pixels)
    engine = engine or ("merged" if fits else "gated")
    if engine == "gated" and (alike or float8):
        plan = padded(requested, denoiser, alike) if requested.layers and alike else requested
        linears = [linear_in(denoiser, name) for name in plan.layers]
    # A model of diffusers says in which dtype it computes, whatever its weights are stored in.
    for_quantised = compute_dtype(getattr(denoiser, "dtype", torch.bfloat16)) if obstacle else torch.bfloat16
    loras = [placed(lora, linears, for_quantised) for lora in plan.loras]
    pairs = LazyDict(lambda index: pairs_of(loras, plan.layers[index], linears[index], for_quantised))
    with lending() as loans:
        if engine == "merged":
            yield lend_merged(denoiser, linears, plan, pairs, loans, float8)
        else:
            yield lend_gated(denoiser, plan, pairs, loans)


def _fits(linears: list[nn.Linear], float8: list[bool], pixels: int) -> bool:
    """Whether the active weights, each in float8 or in its own dtype, fit beside the pristine ones and the headroom."""
    weights = [linear.weight for linear in linears]
    needed = sum(w.numel() if in_float8 else w.nbytes for w, in_float8 in zip(weights, float8, strict=True))
    return not weights or needed + headroom_bytes(pixels) <= free_bytes(weights[0].device)


def _obstacle(denoiser: nn.Module, linears: list[nn.Linear]) -> str:
    """What the base is where its weights cannot be replaced by W + dW: of a quantiser's own layers, its own tensors in
    torch's layers, or elements of one byte; or offloaded by diffusers, which brings the parameters that it knows and no
    others. "" where they can."""
    if any((type(one), type(one.weight)) != (nn.Linear, nn.Parameter) or one.weight.itemsize < 2 for one in linears):
        return "quantised"
    hooks = (part.__dict__.get("_diffusers_hook") for part in (denoiser, *linears))
    return "offloaded in groups" if any(each.get_hook("group_offloading") for each in hooks if each) else ""
