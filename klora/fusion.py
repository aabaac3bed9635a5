"""K-LoRA (arXiv:2502.18461): for every layer and denoising step, which of two LoRAs acts. Torch only.

Scores depend on the weights alone, so the whole schedule is one comparison made before the first step:

    content_wins[t, l] = content_score[l] > bias * scale[t] * gamma * style_score[l]

The score of a layer in one LoRA is the sum of its K largest |dW|, dW = B A and K = the product of both LoRAs' ranks
there. Scores and gamma's L1 norms, which are the sums at K = O * I, come out of one pass over dW, in blocks.

Knows no module tree, no pipeline and no file.   Shapes: O outputs, I inputs, R rank, L layers, T steps.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import isqrt
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.errors import LoRAError, RequestError
from klora.lora import LoRA, LowRank, Plan

BLOCK_ELEMENTS = 1 << 20  # of one layer's dW at a time: 4 MB in fp32, 12 MB with working copies, however large it is
BATCH_ELEMENTS = 1 << 17  # of several layers at a time: they and their working copies stay in a core's cache
CUDA_BLOCK_ELEMENTS = 1 << 26  # of either on a GPU: a block costs some thirty launches, however many layers are in it
# A LoRA is scored at once for partners of these ranks, which people train; for another rank when a partner has it.
RANKS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)

Gamma = Literal["reference", "paper"]
Clock = Literal["step", "reference"]


@dataclass(frozen=True)
class Schedule:
    """How strongly style is favoured as denoising proceeds, tau going from 0 (noise) to 1 (image).

    "s" (Eq 7): alpha * tau + beta.   "s*" (supplement, Eq 12): (alpha * tau + beta) mod alpha.
    """

    alpha: float
    beta: float
    wraps: bool

    @classmethod
    def from_pattern(cls, pattern: str, alpha: float | None = None, beta: float | None = None) -> "Schedule":
        """pattern: "s", "s*" or "auto" (s*). None takes the published value: alpha 1.5, beta 0.5 (s) or 1.275 (s*)."""
        if pattern not in ("auto", "s", "s*"):
            raise RequestError(f"pattern is {pattern!r}. Expected 's', 's*' or 'auto'.")
        wraps = pattern != "s"
        alpha = 1.5 if alpha is None else alpha
        beta = (1.275 if wraps else 0.5) if beta is None else beta
        if not (0 <= alpha < float("inf") and 0 <= beta < float("inf")) or (wraps and alpha == 0):
            raise RequestError(f"alpha is {alpha} and beta is {beta}. Expected numbers >= 0, and alpha > 0 for s*.")
        return cls(alpha, beta, wraps)

    @property
    def pattern(self) -> str:
        """The name of the schedule as from_pattern() takes it: "s" or "s*"."""
        return "s*" if self.wraps else "s"

    def scale(self, tau: Tensor) -> Tensor:
        """S(tau), elementwise; tau in [0, 1]."""
        line = self.alpha * tau + self.beta
        return line % self.alpha if self.wraps else line

    def by_step(self, steps: int) -> Tensor:
        """S at the midpoint of each step, tau = (t + 0.5) / T: float64 [T]."""
        return self.scale((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)


@dataclass(frozen=True, eq=False)
class Fusion:
    """Two LoRAs, scored against each other layer by layer.

    layers: L names in execution order, of both LoRAs.   content_score, style_score: float64 [L], on the CPU; 0 where a
    LoRA lacks the layer, so that the one comparison leaves it to the other.   gamma: the magnitude ratio (Eq 9) that
    the choice uses.   gammas: the ratio by every definition.
    """

    layers: tuple[str, ...]
    content: Mapping[str, LowRank]
    style: Mapping[str, LowRank]
    content_score: Tensor
    style_score: Tensor
    gamma: float
    gammas: Mapping[Gamma, float]

    @property
    def ratio(self) -> Tensor:
        """R = content_score / (gamma * style_score), float64 [L]: inf where only content adapts the layer, 0 where only
        style does."""
        return self.content_score / (self.gamma * self.style_score)

    def content_wins(self, schedule: Schedule, steps: int, style_bias: float = 1.0, clock: Clock = "step") -> Tensor:
        """True where content acts, bool [T, L]. A tie is style's, as in the published code.

        clock "step": tau is the step's midpoint, the same in all layers.   clock "reference": tau is that of the layer
        call, number 1, 2, ... modulo T * L, over T * L, as in the published code: the very last call has tau 0.
        style_bias: finite, >= 0.   Raises RequestError.
        """
        _check_choice("clock", clock, get_args(Clock))
        if steps < 1 or not 0 <= style_bias < float("inf"):
            raise RequestError(f"steps is {steps} and style_bias {style_bias}. Expected 1 or more, and a number >= 0.")
        by_call = clock == "reference"
        scale = schedule.scale(_call_tau(steps, len(self.layers))) if by_call else schedule.by_step(steps)[:, None]
        return self.content_score > style_bias * scale * self.gamma * self.style_score

    def plan(
        self,
        schedule: Schedule,
        *,
        steps: int,
        content_scale: float = 1.0,
        style_scale: float = 1.0,
        style_bias: float = 1.0,
        clock: Clock = "step",
    ) -> Plan:
        """The Plan of content_wins(). The scales multiply what is applied and never enter the choice."""
        return self.gated(self.content_wins(schedule, steps, style_bias, clock), content_scale, style_scale)

    def gated(self, wins: Tensor, content_scale: float = 1.0, style_scale: float = 1.0) -> Plan:
        """The Plan of a choice that has been made. wins: content_wins()'s bool [T, L]."""
        gates = torch.stack([wins.float() * content_scale, (~wins).float() * style_scale], dim=-1)
        return Plan(self.layers, (self.content, self.style), gates, wins)


def fuse(
    content: Mapping[str, LowRank],
    style: Mapping[str, LowRank],
    gamma: Gamma = "reference",
    device: torch.device | str | None = None,
) -> Fusion:
    """Score two LoRAs of one base against each other. Scores that a LoRA object remembers are not computed again.

    content, style: {layer: LowRank}, both in execution order.   K = r_content * r_style per layer (Eq 5).
    gamma "reference": the mean over shared layers of the L1 norms' ratios, without ratios of 3 times that mean or more,
    as in the published code; "paper": the ratio of the norms' sums (Eq 9).   device: where to compute scores, one that
    has float64; None: where the factors are. Devices agree up to the rounding of float32 products.
    Raises LoRAError and RequestError.
    """
    _check_choice("gamma", gamma, get_args(Gamma))
    layers = _merged_order(list(content), list(style))
    ks = dict.fromkeys(layers, 1)
    for lora in (content, style):
        for name, pair in lora.items():
            ks[name] *= pair.rank
    (content_score, content_l1), (style_score, style_l1) = (_scores(lora, ks, device) for lora in (content, style))
    if not torch.stack([content_l1, style_l1]).isfinite().all():
        raise LoRAError("A LoRA's weights are so large that they overflow. Expected one that was trained.")
    gammas = _gammas(content_l1, style_l1)
    return Fusion(tuple(layers), content, style, content_score, style_score, gammas[gamma], gammas)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RequestError(f"{name} is {value!r}. Expected {' or '.join(map(repr, choices))}.")


def style_share(wins: Tensor) -> float | None:
    """The share of all layers and steps in which style acts, in [0, 1]; None for no layers. wins: bool [T, L]."""
    return 1 - wins.double().mean().item() if wins.numel() else None


def _scores(lora: Mapping[str, LowRank], ks: Mapping[str, int], device: torch.device | str | None) -> Tensor:
    """A LoRA's score at each layer's K, and its L1 norm: float64 [2, L], on the CPU; 0 where it lacks the layer.

    ks: {layer: K}, all L.   A LoRA object keeps what is computed, for partners of all RANKS, in its scores: sums
    depend on its own weights alone.
    """
    known = lora.scores if isinstance(lora, LoRA) else {}
    missing: dict[str, tuple[int, ...]] = {}
    for name, pair in lora.items():
        sums = known.get(name, {})
        if ks[name] not in sums:
            wanted = {ks[name], pair.numel, *(pair.rank * rank for rank in RANKS)}
            missing[name] = tuple(sorted(wanted - sums.keys()))
    for name, sums in _computed(lora, missing, device).items():
        known.setdefault(name, {}).update(sums)
    score_and_l1 = dict.fromkeys(ks, (0.0, 0.0))
    for name, pair in lora.items():
        sums = known[name]
        score_and_l1[name] = sums[ks[name]], sums[pair.numel]
    return torch.tensor(list(score_and_l1.values()), dtype=torch.float64).view(-1, 2).T


def _computed(
    lora: Mapping[str, LowRank], ks: Mapping[str, tuple[int, ...]], device: torch.device | str | None
) -> dict[str, dict[int, float]]:
    """{layer: {K: sum of its K largest |dW|}} for all that ks, {layer: several K}, names. Layers of one shape are
    computed together, and all results are copied to the CPU together: a GPU is waited for once."""
    alike: dict[tuple[Hashable, ...], list[str]] = {}
    for name, wanted in ks.items():
        alike.setdefault((lora[name].A.shape, lora[name].B.shape, wanted), []).append(name)
    if not alike:
        return {}
    scored = [importance([lora[name] for name in names], ks[names[0]], device).flatten() for names in alike.values()]
    order = [name for names in alike.values() for name in names]
    sums = torch.cat(scored).cpu().split([len(ks[name]) for name in order])
    by_layer = {name: layer_sums.tolist() for name, layer_sums in zip(order, sums, strict=True)}
    return {name: dict(zip(wanted, by_layer[name], strict=True)) for name, wanted in ks.items()}


def importance(pairs: Sequence[LowRank], ks: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Sum of the k largest |dW| (Eq 3) for each k of ks, or of all O * I if k is larger: float64 [L, len(ks)]. Exact.

    pairs: L layers of one shape and rank, computed a batch of layers at a time, or a block of rows of a large one. On a
    CPU a layer's sums are the same to the last bit whatever the others are.   device: where to compute, and the
    result's; None: the factors' own. No shape depends on a value, so that nothing here waits for a GPU.
    """
    on_cuda = torch.device(device or pairs[0].A.device).type == "cuda"
    block, batch = (CUDA_BLOCK_ELEMENTS, CUDA_BLOCK_ELEMENTS) if on_cuda else (BLOCK_ELEMENTS, BATCH_ELEMENTS)
    layers = max(1, batch // pairs[0].numel)
    batches = [pairs[first : first + layers] for first in range(0, len(pairs), layers)]
    return torch.cat([_sums(*_stacked(together, device), ks, block) for together in batches])


def _stacked(pairs: Sequence[LowRank], device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """A [L, R, I] and B [L, O, R] in float32, copied to the device in one piece each, in the dtype that they have."""
    A, B = (torch.stack(factors) for factors in ([pair.A for pair in pairs], [pair.B for pair in pairs]))
    return A.to(device, non_blocking=A.is_cpu).float(), B.to(device, non_blocking=B.is_cpu).float()


def _sums(A: Tensor, B: Tensor, ks: Sequence[int], block: int) -> Tensor:
    """importance() of one batch. A [L, R, I], B [L, O, R]; block: elements of dW to compute at a time.

    Each product is computed once for all ks, in float32: the largest k so far are carried from block to block, and the
    sums for smaller ks are prefixes of them, sorted.
    """
    layers, numel = len(A), B.shape[1] * A.shape[2]
    most = max((k for k in ks if k < numel), default=0)
    top, l1 = A.new_empty(layers, 0), A.new_zeros(layers, dtype=torch.float64)
    for rows in B.split(max(1, block // A.shape[2]), dim=1):
        magnitudes = _products(rows, A).abs_()
        l1 += magnitudes.sum(2, dtype=torch.float64).sum(1)
        top = _largest(magnitudes.flatten(1), top, most)
    sums = F.pad(top.sort(dim=1, descending=True).values.cumsum(1, dtype=torch.float64), (1, 0))
    return torch.stack([sums[:, k] if k < numel else l1 for k in ks], dim=1)


def _products(B: Tensor, A: Tensor) -> Tensor:
    """B A of each layer, [L, O, I]; on a CPU one by one, as the last bits of MKL's batched products vary with L."""
    if len(A) == 1 or not A.is_cpu:
        return torch.bmm(B, A)
    return torch.cat([torch.bmm(*factors) for factors in zip(B.split(1), A.split(1), strict=True)])


def _largest(magnitudes: Tensor, top: Tensor, k: int) -> Tensor:
    """The k largest of each layer's block, magnitudes [L, N], and of those from earlier blocks, top [L, k or fewer].
    Returns [L, k or fewer], unsorted.

    Top-k is what costs, so that the block is first cut into groups: its k largest lie in the k groups with the largest
    maxima. Groups of sqrt(N / k) elements leave the fewest candidates.
    """
    layers, count = magnitudes.shape
    size = max(1, isqrt(count // max(1, k)))
    even = count // size * size
    groups = magnitudes[:, :even].view(layers, size, -1)
    best = groups.amax(1).topk(min(k, groups.shape[2]), dim=1, sorted=False).indices
    candidates = groups.gather(2, best[:, None].expand(-1, size, -1)).flatten(1)
    top = torch.cat([top, candidates, magnitudes[:, even:]], dim=1)
    return top.topk(min(k, top.shape[1]), dim=1, sorted=False).values


def _gammas(content_l1: Tensor, style_l1: Tensor) -> dict[Gamma, float]:
    """The magnitude ratio by either definition, over layers in which neither LoRA is zero. Arguments: float64 [L]."""
    shared = (content_l1 > 0) & (style_l1 > 0)
    if not shared.any():
        return {"reference": 1.0, "paper": 1.0}  # in no layer is there anything to choose
    content_l1, style_l1 = content_l1[shared], style_l1[shared]
    ratios = content_l1 / style_l1
    typical = ratios[ratios < 3 * ratios.mean()]
    return {"reference": typical.mean().item(), "paper": (content_l1.sum() / style_l1.sum()).item()}


def _call_tau(steps: int, layers: int) -> Tensor:
    """tau as the published code counts it, at each call of a layer: float64 [T, L]."""
    calls = torch.arange(1, steps * layers + 1, dtype=torch.float64)
    return (calls % (steps * layers) / (steps * layers)).view(steps, layers)


def _merged_order(first: list[str], second: list[str]) -> list[str]:
    """The names of both lists without repetition, in an order that agrees with each list's own: that of execution."""
    merged: dict[str, None] = {}
    shared, rest = set(second), iter(second)
    for name in first:
        if name in shared:
            merged |= dict.fromkeys(takewhile(name.__ne__, rest))
        merged[name] = None
    return list(merged | dict.fromkeys(rest))
