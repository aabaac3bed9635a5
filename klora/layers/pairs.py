"""A plan's pairs of factors as the linears of a module need them. Lends nothing.   I inputs, O outputs, R rank."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from klora.errors import LoRAError
from klora.lora import LoRA, LowRank, Plan

Pairs = list[LowRank | None]
"""One layer's, in the order of a plan's LoRAs; None where a LoRA does not adapt the layer."""

ALIGNED = 16  # GPUs multiply at ranks that are its multiples without padding


def linear_in(denoiser: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name. Raises LoRAError where there is none, or others have changed how it runs."""
    parent: nn.Module | None = None
    module: nn.Module | None = denoiser
    # get_submodule() is slow: each model on the way looks for more than a module.
    for part in name.split("."):
        parent, module = module, module._modules.get(part) if module is not None else None
    if not isinstance(module, nn.Linear):
        raise LoRAError(
            f"{name!r} is no linear layer of {type(denoiser).__name__}. Expected a LoRA read for this base, and no "
            "adapters on the base: unload_lora_weights() takes diffusers' off, and its end those of another attached()."
        )
    if parent is not None and parent.__dict__.get("fused_projections"):
        raise LoRAError(f"{name!r} is not run where projections are fused. Expected a base loaded anew.")
    if module.weight.is_meta and hasattr(module, "_hf_hook"):  # as accelerate leaves it, which brings it for each call
        raise LoRAError(f"{name!r} has no weight where it is. Expected a base that is not offloaded layer by layer.")
    return module


def extended(plan: Plan, names: Iterable[str], lora: Mapping[str, LowRank] = MappingProxyType({})) -> Plan:
    """The plan with these layers added, and one LoRA more, whose gates are 0."""
    layers = tuple(dict.fromkeys((*plan.layers, *names)))
    gates = F.pad(plan.gates, (0, 1, 0, len(layers) - len(plan.layers)))
    return Plan(layers, (*plan.loras, lora), gates)


def padded(plan: Plan, denoiser: nn.Module, names: Iterable[str]) -> Plan:
    """The plan with one LoRA more, of zeros, so large that these linears are adapted, too, and that the ranks of every
    layer add up to the same number, a multiple of ALIGNED."""
    linears = {name: linear_in(denoiser, name) for name in (*plan.layers, *names)}
    ranks = {name: sum(lora[name].rank for lora in plan.loras if name in lora) for name in linears}
    common = -(-max(ranks.values()) // ALIGNED) * ALIGNED
    zeros = {}
    for name, linear in linears.items():
        rank, weight = common - ranks[name], linear.weight  # which, of a quantiser's, may make no tensors like itself
        like = torch.empty(0, device=weight.device, dtype=compute_dtype(weight.dtype))
        zeros[name] = LowRank(like.new_zeros(rank, linear.in_features), like.new_zeros(linear.out_features, rank))
    return extended(plan, linears, zeros)


def placed(lora: Mapping[str, LowRank], linears: list[nn.Linear], for_quantised: torch.dtype) -> Mapping[str, LowRank]:
    """A LoRA's own cached copy beside the first of these linears, as LoRA.placed() keeps it; most often the others are
    on the same device. What is no LoRA is returned as it is."""
    if not isinstance(lora, LoRA) or not linears:
        return lora
    return lora.placed(linears[0].weight.device, compute_dtype(linears[0].weight.dtype, for_quantised))


def compute_dtype(stored: torch.dtype, for_quantised: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype in which a LoRA's products are computed beside a weight stored in this one: the same, or for_quantised
    if that is not one to compute in."""
    return stored if stored.is_floating_point and stored.itemsize > 1 else for_quantised


def pairs_of(loras: list[Mapping[str, LowRank]], name: str, linear: nn.Linear, for_quantised: torch.dtype) -> Pairs:
    """The pairs of one layer, on its weight's device and in its compute_dtype(). Raises LoRAError for another shape."""
    weight, expected = linear.weight, (linear.out_features, linear.in_features)
    placement = weight.device, compute_dtype(weight.dtype, for_quantised)
    pairs: Pairs = [lora.get(name) for lora in loras]
    for lora, pair in enumerate(pairs):
        if pair is None:
            continue
        if pair.shape != expected:
            raise LoRAError(f"{name!r} is {pair.shape} in the LoRA. Expected {expected}: one made for this base.")
        if pair.placement != placement or pair.A.requires_grad or pair.B.requires_grad:  # most are there already
            pairs[lora] = LowRank(pair.A.detach().to(*placement), pair.B.detach().to(*placement))
    return pairs
