"""A plan's pairs of factors as the linears of a module need them. Lends nothing.   I inputs, O outputs, R rank."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.errors import LoRAError
from klora.lora import LoRA, LowRank, Plan

Pairs = list[LowRank | None]
"""A layer's, one for each LoRA of a plan."""

ALIGNED = 16  # ranks of which GPUs' products need no remainder


def linear_in(denoiser: nn.Module, name: str) -> nn.Linear:
    """The layer of this name. Raises LoRAError where there is none, or others have changed how it is run."""
    parent: nn.Module | None = None
    module: nn.Module | None = denoiser
    # get_submodule() is slow: each model on the way looks for more than a module.
    for part in name.split("."):
        parent, module = module, module._modules.get(part) if module is not None else None
    if not isinstance(module, nn.Linear):
        raise LoRAError(
            f"{name!r} is no linear layer of {type(denoiser).__name__}. "
            "Expected a LoRA read for this base, and no adapters on the base, as load_lora_weights() puts there."
        )
    if parent is not None and parent.__dict__.get("fused_projections"):
        raise LoRAError(f"{name!r} is not run where projections are fused. Expected a base loaded anew.")
    if module.weight.is_meta and hasattr(module, "_hf_hook"):  # as accelerate leaves it, which brings it for each call
        raise LoRAError(f"{name!r} has no weight where it is. Expected a base that is not offloaded layer by layer.")
    return module


def covering(plan: Plan, names: Iterable[str], lora: Mapping[str, LowRank] = MappingProxyType({})) -> Plan:
    """With these layers, too, and with a LoRA more, that never acts."""
    layers = tuple(dict.fromkeys((*plan.layers, *names)))
    gates = F.pad(plan.gates, (0, 1, 0, len(layers) - len(plan.layers)))
    return Plan(layers, (*plan.loras, lora), gates)


def filled(plan: Plan, denoiser: nn.Module, names: Iterable[str]) -> Plan:
    """With a LoRA more, of zeros, after which all of these linears are adapted, too, and every layer by one rank."""
    linears = {name: linear_in(denoiser, name) for name in (*plan.layers, *names)}
    ranks = {name: sum(lora[name].rank for lora in plan.loras if name in lora) for name in linears}
    common = -(-max(ranks.values()) // ALIGNED) * ALIGNED
    zeros = {
        name: LowRank(
            linear.weight.new_zeros(common - ranks[name], linear.in_features, dtype=dtype_of(linear.weight)),
            linear.weight.new_zeros(linear.out_features, common - ranks[name], dtype=dtype_of(linear.weight)),
        )
        for name, linear in linears.items()
    }
    return covering(plan, linears, zeros)


def placed(lora: Mapping[str, LowRank], linears: list[nn.Linear]) -> Mapping[str, LowRank]:
    """A LoRA as it remembers itself where the first of these linears is, and so most often all of them."""
    if not isinstance(lora, LoRA) or not linears:
        return lora
    weight = linears[0].weight
    return lora.placed(weight.device, dtype_of(weight))


def dtype_of(weight: Tensor) -> torch.dtype:
    """What a LoRA is computed in beside a layer of this weight."""
    return weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.bfloat16  # quantised bases


def pairs_of(loras: list[Mapping[str, LowRank]], name: str, linear: nn.Linear) -> Pairs:
    """The layer's pair of each LoRA, None where it has none, on the base weight's device and in its dtype."""
    weight, expected = linear.weight, (linear.out_features, linear.in_features)
    place = weight.device, dtype_of(weight)
    found: Pairs = [lora.get(name) for lora in loras]
    for which, pair in enumerate(found):
        if pair is None:
            continue
        if pair.shape != expected:
            raise LoRAError(f"{name!r} is {pair.shape} in the LoRA. Expected {expected}: one made for this base.")
        if pair.place != place or pair.A.requires_grad or pair.B.requires_grad:  # most were placed before
            found[which] = LowRank(pair.A.detach().to(*place), pair.B.detach().to(*place))
    return found
