"""Lend low-rank updates to a module tree for the length of a `with` block. The only code that touches one.

Both LoRAs are stacked along the rank and the rank is gated:

    y = W x + b + B (g * A) x        A = [A_1; A_2; ...]  [R, I]     B = [B_1, B_2, ...]  [O, R]     g  [R, 1]

Two engines, equal up to rounding:   gated   computes that formula; needs little memory, works on any base weight.
                                     merged  gives each touched layer an active weight W + B diag(g) A, rewritten only
                                             where g changed and always from the pristine W; costs nothing per step.

Knows no fusion, no pipeline and no file. The base's own parameters are never written to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.device import free_bytes, has_triton
from klora.errors import LoRAError
from klora.lora import Acting, LoRA, LowRank, Plan

T = TypeVar("T")
Engine = Literal["gated", "merged"]
HEADROOM_BYTES = 6 << 30  # left free by the merged engine: activations of a batch of four at 1024 px, and the VAE


Apply = Callable[[int, list[int]], None]
"""(the step whose gates are to act, the indices of the layers where they differ from those that do) -> None"""

Pairs = list[LowRank | None]
"""A layer's, one for each LoRA of a plan."""

Loan = tuple[dict[str, Any], str, Any]
"""(the module's own table of parts, key, what was there): Any, because parts are modules or parameters."""

NOTHING = object()  # in the place of what was there


class Planner(Protocol):
    """What can say which LoRA acts where and when: a Fusion."""

    def plan(self, schedule: Any, **options: Any) -> Plan: ...  # Any: the schedule is the planner's own affair


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


@contextmanager
def attached(
    denoiser: nn.Module, lora: Plan | Planner, schedule: Any = None, *, engine: Engine | None = None, **options: Any
) -> Iterator[Gate]:
    """Lend LoRAs to a module: `attached(unet, fusion, schedule, steps=50)`, or `attached(unet, plan)`.

    Yields a Gate standing at step 0; gate.set_step(i) moves it. engine: None takes merged where a copy of the touched
    weights fits in memory, else gated. On leaving, by whatever exception, every module and parameter is back.
    Raises LoRAError when a layer is not a linear of the module, or has another shape.
    """
    plan = lora if isinstance(lora, Plan) else lora.plan(schedule, **options)
    linears = [_linear(denoiser, name) for name in plan.layers]
    loras = [_placed(lora, linears) for lora in plan.loras]
    pairs = WhenAsked(lambda index: _pairs(loras, plan.layers[index], linears[index]))
    engine = engine or ("merged" if _fits(linears) else "gated")
    with lending() as loans:
        if engine == "merged":
            yield _lent_merged(linears, plan, pairs, loans)
        else:
            yield _lent_gated(denoiser, plan, pairs, loans)


@contextmanager
def lending() -> Iterator[list[Loan]]:
    """A list of loans, all undone on leaving, by whatever exception."""
    loans: list[Loan] = []
    try:
        yield loans
    finally:
        # Cog injects a cancellation at any bytecode that begins a call or ends a loop, here too. Hence no function, and
        # one more round of what was interrupted.
        interruption: BaseException | None = None
        while loans:
            try:
                while loans:
                    slots, key, original = loans[-1]
                    if original is NOTHING:
                        slots.pop(key, None)
                    else:
                        slots[key] = original
                    loans.pop()
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption


def _lent_merged(linears: list[nn.Linear], plan: Plan, pairs: Mapping[int, Pairs], loans: list[Loan]) -> Gate:
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


def _lent_gated(denoiser: nn.Module, plan: Plan, pairs: Mapping[int, Pairs], loans: list[Loan]) -> Gate:
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


def lend_linear(loans: list[Loan], module: nn.Module, name: str, adapted: Callable[[nn.Linear], LoRALinear]) -> None:
    """Put adapted(linear) in the place of a module's linear layer, until lending() ends. Raises LoRAError."""
    path, _, child = name.rpartition(".")
    lend(loans, module.get_submodule(path)._modules, child, adapted(_linear(module, name)))


def _placed(lora: Mapping[str, LowRank], linears: list[nn.Linear]) -> Mapping[str, LowRank]:
    """A LoRA as it remembers itself where the first of these linears is, and so most often all of them."""
    if not isinstance(lora, LoRA) or not linears:
        return lora
    weight = linears[0].weight
    return lora.placed(weight.device, _dtype(weight))


def _dtype(weight: Tensor) -> torch.dtype:
    """What a LoRA is computed in beside a layer of this weight."""
    return weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.bfloat16  # quantised bases


def _pairs(loras: list[Mapping[str, LowRank]], name: str, linear: nn.Linear) -> Pairs:
    """The layer's pair of each LoRA, None where it has none, on the base weight's device and in its dtype."""
    weight, own = linear.weight, [lora.get(name) for lora in loras]
    device, dtype, expected = weight.device, _dtype(weight), (linear.out_features, linear.in_features)
    for seen in (pair.shape for pair in own if pair is not None):
        if seen != expected:
            raise LoRAError(f"{name!r} is {seen} in the LoRA. Expected {expected}: one made for this base.")
    return [
        pair  # most were placed there before
        if pair is None or (pair.A.device, pair.A.dtype, pair.B.dtype) == (device, dtype, dtype)
        else LowRank(pair.A.to(device, dtype), pair.B.to(device, dtype))
        for pair in own
    ]


def _stacked(pairs: list[LowRank]) -> LowRank:
    """Along the rank: the sum of these updates as one."""
    return LowRank(torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1))


def _linear(denoiser: nn.Module, name: str) -> nn.Linear:
    module: nn.Module | None = denoiser
    # get_submodule() is slow: each model on the way looks for more than a module.
    for part in name.split("."):
        module = module._modules.get(part) if module is not None else None
    if not isinstance(module, nn.Linear):
        raise LoRAError(
            f"{name!r} is no linear layer of {type(denoiser).__name__}. Expected a LoRA read for this base."
        )
    return module


def _fits(linears: list[nn.Linear]) -> bool:
    """Whether an active copy of these weights fits beside the pristine ones."""
    weights = [linear.weight for linear in linears]
    if any(type(linear) is not nn.Linear for linear in linears) or any(w.itemsize < 2 for w in weights):
        return False  # a quantised base: its weights cannot be written as W + dW
    return not weights or sum(w.nbytes for w in weights) + HEADROOM_BYTES <= free_bytes(weights[0].device)


def lend(loans: list[Loan], slots: dict[str, Any], key: str, loan: Any) -> None:
    """Put something in the place of what slots hold under the key, until lending() ends."""
    loans.append((slots, key, slots[key]))  # before the swap, so that an exception in between loses nothing
    slots[key] = loan


def clear(loans: list[Loan], slots: dict[str, Any], key: str) -> None:
    """Leave the key to whoever writes there, until lending() ends: then it is as it was, or not there if it was not."""
    loans.append((slots, key, slots.get(key, NOTHING)))
    slots.pop(key, None)
