"""The two engines that lend a plan's LoRAs to linear layers, and the Gate that moves what they lent."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.device import has_triton
from klora.errors import RequestError
from klora.layers.float8 import FLOAT8, Float8Linear, scales_of
from klora.layers.loans import InPlaceOf, Loan, lend
from klora.layers.pairs import Pairs, linear_in
from klora.lora import Acting, LowRank, Plan

T = TypeVar("T")
Engine = Literal["gated", "merged"]

Apply = Callable[[int, list[int]], None]
"""(the step whose gates are to act, the indices of the layers where they differ from those that do) -> None"""


class LoRALinear(InPlaceOf):
    """base(x) + B A x, for inference, in three kernels; one LoRA, a weighted sum and a switching pair.

    lora_A [R, I], lora_B [O, R]; their values may change between calls. Brought to the activations' dtype, which they
    have but beside quantised weights, and to their device, which is another when the base has been moved since.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__(base)
        self.lora_A, self.lora_B = lora_A, lora_B

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)  # of this call alone, and so added to where it lies
        hidden = F.linear(x, self.lora_A.to(x)).reshape(-1, self.lora_A.shape[0])
        return y.reshape(-1, self.out_features).addmm_(hidden, self.lora_B.to(hidden).t()).view(y.shape)


class Gate:
    """What attached() yields: moves the attached LoRAs to a denoising step. float8: how many layers multiply in it."""

    def __init__(self, plan: Plan, engine: Engine, apply: Apply, float8: int = 0) -> None:
        self.engine, self.float8 = engine, float8
        self.flips = 0
        self._gates = plan.gates.cpu()  # compared by the host, which then never waits for the denoiser's device
        self._apply = apply
        self._current = torch.full_like(self._gates[0], torch.nan)
        self.set_step(0)
        self.flips = 0  # the first writing is no flip

    def set_step(self, step: int) -> Self:
        """Let the LoRAs act as planned for this step, 0-based; after the last they act as in it.

        Raises RequestError for a step that is not the plan's, and for a Step of another number of steps: the schedule
        would be another. A plan of one step is for any number."""
        planned, of = len(self._gates), getattr(step, "of", len(self._gates))
        if planned > 1 and not (0 <= step <= planned == of):
            raise RequestError(f"Step {step} of {of}, but {planned} are planned. Expected attached() for as many.")
        step = min(step, planned - 1)
        changed = (self._gates[step] != self._current).any(-1).nonzero().flatten().tolist()
        if changed:
            self._apply(step, changed)
        self._current = self._gates[step]
        self.flips += len(changed)
        return self


def lent_merged(
    denoiser: nn.Module,
    linears: list[nn.Linear],
    plan: Plan,
    pairs: Mapping[int, Pairs],
    loans: list[Loan],
    float8: Collection[str],
) -> Gate:
    """A weight of its own in the place of each layer's, which is written anew where gates change; in the place of the
    layers named in float8 a Float8Linear with it."""
    pristine, gates = [linear.weight for linear in linears], plan.gates.cpu()
    rounded = [index for index, name in enumerate(plan.layers) if name in float8]
    scales = scales_of({index: (pristine[index], pairs[index]) for index in rounded}, gates.abs().amax(0))
    active = WhenAsked(lambda index: torch.empty_like(pristine[index], dtype=FLOAT8 if index in scales else None))
    write = _merges(pristine, active, scales)
    lent = dict[int, nn.Parameter]()

    def apply(step: int, changed: list[int]) -> None:
        if any(linears[index].weight is not lent[index] for index in changed if index in lent):
            raise RequestError("Another attached() lies over this one. Expected the inner one alone to change steps.")
        rows = zip(changed, gates[step, changed].tolist(), strict=True)
        write((index, _acting(pairs[index], own)) for index, own in rows)
        torch.clear_autocast_cache()  # of what these weights were
        for index in changed:  # a module that is moved, as offloading does, is given other tensors
            if index in lent and lent[index].data_ptr() != active[index].data_ptr():
                lent[index].data.copy_(active[index])

    gate = Gate(plan, "merged", apply, len(scales))  # a GPU writes while the host lends
    for index, (name, linear) in enumerate(zip(plan.layers, linears, strict=True)):
        if index in scales:
            lend_linear(loans, denoiser, name, partial(Float8Linear, quantized=active[index], scale=scales[index]))
        else:  # as the base's own in all that compiled code has been told of it, or it would be compiled again
            requires_grad = pristine[index].requires_grad
            lent[index] = nn.Parameter(active[index], requires_grad)
            lend(loans, linear._parameters, "weight", lent[index])
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


def _merges(
    weights: list[Tensor], outs: Mapping[int, Tensor], scales: Mapping[int, Tensor]
) -> Callable[[Iterable[tuple[int, Acting]]], None]:
    """What writes W + sum of gate * B A, over its scale if it has one, of the layers that it is given: (index, what
    acts there)."""
    devices = {weight.device for weight in weights}
    if len(devices) == 1 and has_triton(*devices):
        from klora.kernels import Merges  # triton is not everywhere

        return Merges(weights, outs, scales)

    def write(layers: Iterable[tuple[int, Acting]]) -> None:
        for index, acting in layers:
            weight, out = weights[index].detach(), outs[index]
            merged = torch.empty_like(weight) if index in scales else out
            _merge(weight, acting, merged)
            if index in scales:
                out.copy_(merged.div_(scales[index][:, None]))

    return write


def _merge(weight: Tensor, acting: Acting, out: Tensor) -> None:
    """out = weight + sum of gate * B A, in one pass over the weight."""
    if not acting:
        out.copy_(weight)
    else:  # one, as mostly: nothing is to be stacked, and no B rounded
        [(pair, gate)] = acting if len(acting) == 1 else [(_stacked([LowRank(p.A, p.B * g) for p, g in acting]), 1.0)]
        torch.addmm(weight, pair.B, pair.A, alpha=gate, out=out)


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


def lend_linear(loans: list[Loan], module: nn.Module, name: str, adapted: Callable[[nn.Linear], nn.Module]) -> None:
    """Put adapted(linear) in the place of a module's linear layer, until lending() ends. Raises LoRAError."""
    path, _, child = name.rpartition(".")
    lend(loans, module.get_submodule(path)._modules, child, adapted(linear_in(module, name)))
