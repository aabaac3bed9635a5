"""The two engines that lend a plan's LoRAs to linear layers, and the Gate that moves them from step to step."""

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
from klora.lora import GatedPairs, LowRank, Plan

T = TypeVar("T")
Engine = Literal["gated", "merged"]

Apply = Callable[[int, list[int]], None]
"""(step, indices of the layers whose gates differ from the present ones) -> None. Have that step's gates act there."""


class LoRALinear(InPlaceOf):
    """base(x) + B A x, for inference, in three kernels: one LoRA, a weighted sum or a switching pair.

    lora_A [R, I], lora_B [O, R]; their values may change between calls. Each call brings them to the dtype and device
    of its activations: another dtype beside quantised weights, another device when the base has been moved since.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__(base)
        self.lora_A, self.lora_B = lora_A, lora_B

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        hidden = F.linear(x, self.lora_A.to(x)).reshape(-1, self.lora_A.shape[0])
        # y is of this call alone, and so added to where it lies; a quantiser's own tensor would add to a copy.
        add = Tensor.addmm_ if type(y) is Tensor else Tensor.addmm
        return add(y.reshape(-1, self.out_features), hidden, self.lora_B.to(hidden).t()).view(y.shape)


class Gate:
    """What attached() yields: moves the attached LoRAs to a denoising step.

    flips: how many times a layer's gates have changed since step 0 was set.   float8: how many layers multiply in it.
    """

    def __init__(self, plan: Plan, engine: Engine, apply: Apply, float8: int = 0) -> None:
        self.engine, self.float8 = engine, float8
        self.flips = 0
        self._gates = plan.gates.cpu()  # compared by the host, which then never waits for the denoiser's device
        self._apply = apply
        self._current = torch.full_like(self._gates[0], torch.nan)
        self.set_step(0)
        self.flips = 0  # the first writing is no flip

    def set_step(self, step: int) -> Self:
        """Let the LoRAs act as planned for this step, from 0; one past the last, where denoising ends, is as the last.

        Raises RequestError for a step outside the plan, and for a Step of another number of steps than are planned: the
        schedule would be another. A plan of one step serves any number."""
        planned, steps = len(self._gates), getattr(step, "steps", len(self._gates))
        if planned > 1 and not (0 <= step <= planned == steps):
            raise RequestError(f"Step {step} of {steps}, but {planned} are planned. Expected attached() for as many.")
        step = min(step, planned - 1)
        changed = (self._gates[step] != self._current).any(-1).nonzero().flatten().tolist()
        if changed:
            self._apply(step, changed)
        self._current = self._gates[step]
        self.flips += len(changed)
        return self


def lend_merged(
    denoiser: nn.Module,
    linears: list[nn.Linear],
    plan: Plan,
    pairs: Mapping[int, Pairs],
    loans: list[Loan],
    float8: Collection[str],
) -> Gate:
    """Put an active weight in the place of each layer's, to be rewritten where gates change. A layer named in float8 is
    replaced by a Float8Linear, which has it in that dtype. pairs, linears: by index into plan.layers."""
    pristine, gates = [linear.weight for linear in linears], plan.gates.cpu()
    in_float8 = [index for index, name in enumerate(plan.layers) if name in float8]
    scales = scales_of({index: (pristine[index], pairs[index]) for index in in_float8}, gates.abs().amax(0))
    active = LazyDict(lambda index: torch.empty_like(pristine[index], dtype=FLOAT8 if index in scales else None))
    write = _merges(pristine, active, scales)
    parameters = dict[int, nn.Parameter]()  # of the active weights that are lent

    def apply(step: int, changed: list[int]) -> None:
        if any(linears[index].weight is not parameters[index] for index in changed if index in parameters):
            seen = "A layer has another weight than attached() put there, as an inner attached() or offloading sets one"
            raise RequestError(f"{seen}. Expected the inner one alone to change steps, and no offloading within.")
        rows = zip(changed, gates[step, changed].tolist(), strict=True)
        write((index, _gated_pairs(pairs[index], gates_of_layer)) for index, gates_of_layer in rows)
        torch.clear_autocast_cache()  # of what these weights were
        for index in changed:  # a module that is moved, as offloading does, is given other tensors
            if index in parameters and parameters[index].data_ptr() != active[index].data_ptr():
                parameters[index].data.copy_(active[index])

    gate = Gate(plan, "merged", apply, len(scales))  # a GPU writes while the host lends
    for index, (name, linear) in enumerate(zip(plan.layers, linears, strict=True)):
        if index in scales:
            lend_linear(loans, denoiser, name, partial(Float8Linear, quantized=active[index], scale=scales[index]))
        else:  # as the base's own in all that compiled code has been told of it, or it would be compiled again
            requires_grad = pristine[index].requires_grad
            parameters[index] = nn.Parameter(active[index], requires_grad)
            lend(loans, linear._parameters, "weight", parameters[index])
    return gate


class LazyDict(dict[int, T]):
    """{index: make(index)}, made at the first look-up: a GPU then works on one layer while the host makes the next."""

    def __init__(self, make: Callable[[int], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, index: int) -> T:
        value = self[index] = self._make(index)
        return value


def _gated_pairs(pairs: Pairs, gates: list[float]) -> GatedPairs:
    return [(pair, gate) for pair, gate in zip(pairs, gates, strict=True) if pair is not None and gate]


def _merges(
    weights: list[Tensor], outs: Mapping[int, Tensor], scales: Mapping[int, Tensor]
) -> Callable[[Iterable[tuple[int, GatedPairs]]], None]:
    """A function that writes outs[i] = weights[i] + sum of gate * B A, divided by scales[i] where there is one, for all
    (i, pairs with their gates) that it is given."""
    devices = {weight.device for weight in weights}
    if len(devices) == 1 and has_triton(*devices):
        from klora.kernels import Merges  # triton is not everywhere

        return Merges(weights, outs, scales)

    def write(layers: Iterable[tuple[int, GatedPairs]]) -> None:
        for index, acting in layers:
            weight, out = weights[index].detach(), outs[index]
            merged = torch.empty_like(weight) if index in scales else out
            _merge(weight, acting, merged)
            if index in scales:
                out.copy_(merged.div_(scales[index][:, None]))

    return write


def _merge(weight: Tensor, acting: GatedPairs, out: Tensor) -> None:
    """out = weight + sum of gate * B A, in one pass over the weight."""
    if not acting:
        out.copy_(weight)
    elif len(acting) == 1:  # as mostly: nothing is to be stacked, and no B rounded
        [(pair, gate)] = acting
        torch.addmm(weight, pair.B, pair.A, alpha=gate, out=out)
    else:
        both = _stacked([LowRank(pair.A, pair.B * gate) for pair, gate in acting])
        torch.addmm(weight, both.B, both.A, out=out)


def lend_gated(denoiser: nn.Module, plan: Plan, pairs: Mapping[int, Pairs], loans: list[Loan]) -> Gate:
    """Put a LoRALinear in the place of each layer, with the gates multiplied into its stacked A: B (g * (A x)) is
    B (g * A) x, so that a step costs nothing more. A is written in place: compiled code is not traced again."""
    # By layer: (rows of the stacked A, the pristine A, the LoRA that has it).
    slices: list[list[tuple[Tensor, Tensor, int]]] = []
    for index, name in enumerate(plan.layers):
        adapting = [(pair, lora) for lora, pair in enumerate(pairs[index]) if pair is not None]
        stacked = _stacked([pair for pair, _ in adapting])
        rows = stacked.A.split([pair.rank for pair, _ in adapting])
        slices.append([(part, pair.A, lora) for part, (pair, lora) in zip(rows, adapting, strict=True)])
        lend_linear(loans, denoiser, name, partial(LoRALinear, lora_A=stacked.A, lora_B=stacked.B))
    gates = plan.gates.cpu()

    def apply(step: int, changed: list[int]) -> None:
        step_gates = gates[step].tolist()
        writes = [(rows, A, step_gates[index][lora]) for index in changed for rows, A, lora in slices[index]]
        gated, pristine, factors = (list(column) for column in zip(*writes, strict=True))
        torch._foreach_copy_(gated, pristine)  # all in a launch or two
        torch._foreach_mul_(gated, factors)

    return Gate(plan, "gated", apply)


def _stacked(pairs: list[LowRank]) -> LowRank:
    """One pair whose update is the sum of theirs: A [sum of R, I], B [O, sum of R]."""
    return LowRank(torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1))


def lend_linear(loans: list[Loan], module: nn.Module, name: str, adapted: Callable[[nn.Linear], nn.Module]) -> None:
    """Put adapted(linear) in the place of a module's linear layer, until lending() ends. Raises LoRAError."""
    path, _, child = name.rpartition(".")
    lend(loans, module.get_submodule(path)._modules, child, adapted(linear_in(module, name)))
