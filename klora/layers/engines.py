"""The two engines that lend a plan's LoRAs to linear layers, and the Gate that moves what they lent."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.device import has_triton
from klora.layers.loans import Loan, lend
from klora.layers.pairs import Pairs, linear_in
from klora.lora import Acting, LowRank, Plan

T = TypeVar("T")
Engine = Literal["gated", "merged"]

Apply = Callable[[int, list[int]], None]
"""(the step whose gates are to act, the indices of the layers where they differ from those that do) -> None"""


class LoRALinear(nn.Module):
    """base(x) + B A x, for inference, in three kernels; one LoRA, a weighted sum and a switching pair.

    lora_A [R, I], lora_B [O, R]; their values may change between calls. Cast to the activations' dtype, which they have
    but beside quantised weights.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = lora_A, lora_B
        # Pipelines and text encoders ask a linear for these.
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)  # of this call alone, and so added to where it lies
        hidden = F.linear(x, self.lora_A.to(x.dtype)).reshape(-1, self.lora_A.shape[0])
        return y.reshape(-1, self.out_features).addmm_(hidden, self.lora_B.to(x.dtype).t()).view(y.shape)


class Gate:
    """What attached() yields: moves the attached LoRAs to a denoising step."""

    def __init__(self, plan: Plan, engine: Engine, apply: Apply) -> None:
        self.engine = engine
        self.flips = 0
        self._gates = plan.gates.cpu()  # compared by the host, which then never waits for the denoiser's device
        self._apply = apply
        self._current = torch.full_like(self._gates[0], torch.nan)
        self.set_step(0)
        self.flips = 0  # the first writing is no flip

    def set_step(self, step: int) -> Self:
        """Let the LoRAs act as planned for this step, 0-based; steps beyond the last keep its choice."""
        step = min(max(step, 0), len(self._gates) - 1)
        changed = (self._gates[step] != self._current).any(-1).nonzero().flatten().tolist()
        if changed:
            self._apply(step, changed)
        self._current = self._gates[step]
        self.flips += len(changed)
        return self


def lent_merged(linears: list[nn.Linear], plan: Plan, pairs: Mapping[int, Pairs], loans: list[Loan]) -> Gate:
    """A weight of its own in the place of each layer's, which is written anew where gates change."""
    pristine = [linear.weight for linear in linears]
    active = WhenAsked(lambda index: torch.empty_like(pristine[index]))
    gates, write = plan.gates.cpu(), _merges(pristine, active)

    def apply(step: int, changed: list[int]) -> None:
        rows = zip(changed, gates[step, changed].tolist(), strict=True)
        write((index, _acting(pairs[index], own)) for index, own in rows)

    gate = Gate(plan, "merged", apply)  # a GPU writes while the host lends
    for index, (linear, own) in enumerate(zip(linears, pristine, strict=True)):
        # As the base's own in all that compiled code has been told of it, or it would be compiled again.
        lend(loans, linear._parameters, "weight", nn.Parameter(active[index], own.requires_grad))
    return gate


class WhenAsked(dict[int, T]):
    """{index: what make(index) gave when it was first asked for}, while a GPU is at work on those asked before."""

    def __init__(self, make: Callable[[int], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, index: int) -> T:
        value = self[index] = self._make(index)
        return value


def _acting(pairs: Pairs, gates: list[float]) -> Acting:
    return [(pair, gate) for pair, gate in zip(pairs, gates, strict=True) if pair is not None and gate]


def _merges(weights: list[Tensor], outs: Mapping[int, Tensor]) -> Callable[[Iterable[tuple[int, Acting]]], None]:
    """What writes W + sum of gate * B A of the layers that it is given: (index, what acts there)."""
    devices = {weight.device for weight in weights}
    if len(devices) == 1 and has_triton(*devices):
        from klora.kernels import Merges  # triton is not everywhere

        return Merges(weights, outs)

    def write(layers: Iterable[tuple[int, Acting]]) -> None:
        for index, acting in layers:
            _merge(weights[index].detach(), acting, outs[index])

    return write


def _merge(weight: Tensor, acting: Acting, out: Tensor) -> None:
    """out = weight + sum of gate * B A, in one pass over the weight."""
    if not acting:
        out.copy_(weight)
    elif len(acting) == 1:
        [(pair, gate)] = acting
        torch.addmm(weight, pair.B, pair.A, alpha=gate, out=out)
    else:
        both = _stacked([LowRank(pair.A, pair.B * gate) for pair, gate in acting])
        torch.addmm(weight, both.B, both.A, out=out)


def lent_gated(denoiser: nn.Module, plan: Plan, pairs: Mapping[int, Pairs], loans: list[Loan]) -> Gate:
    """A LoRALinear in the place of each layer, whose A holds the gates: B (g * (A x)) is B (g * A) x, at no cost per
    step. Its factors never change their place, so that compiled code is not traced again."""
    rows: list[list[tuple[Tensor, Tensor, int]]] = []  # of each layer: (its place in the stacked A, an A, whose it is)
    for index, name in enumerate(plan.layers):
        acting = [(pair, lora) for lora, pair in enumerate(pairs[index]) if pair is not None]
        both = _stacked([pair for pair, _ in acting])
        places = both.A.split([pair.rank for pair, _ in acting])
        rows.append([(place, pair.A, lora) for place, (pair, lora) in zip(places, acting, strict=True)])
        lend_linear(loans, denoiser, name, partial(LoRALinear, lora_A=both.A, lora_B=both.B))
    gates = plan.gates.cpu()

    def apply(step: int, changed: list[int]) -> None:
        own = gates[step].tolist()
        written = [(place, A, own[index][lora]) for index in changed for place, A, lora in rows[index]]
        places, pristine, factors = (list(column) for column in zip(*written, strict=True))
        torch._foreach_copy_(places, pristine)  # all in a launch or two
        torch._foreach_mul_(places, factors)

    return Gate(plan, "gated", apply)


def _stacked(pairs: list[LowRank]) -> LowRank:
    """Along the rank: the sum of these updates as one."""
    return LowRank(torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1))


def lend_linear(loans: list[Loan], module: nn.Module, name: str, adapted: Callable[[nn.Linear], LoRALinear]) -> None:
    """Put adapted(linear) in the place of a module's linear layer, until lending() ends. Raises LoRAError."""
    path, _, child = name.rpartition(".")
    lend(loans, module.get_submodule(path)._modules, child, adapted(linear_in(module, name)))
