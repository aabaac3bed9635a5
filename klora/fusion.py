"""K-LoRA (arXiv:2502.18461): for every layer and denoising step, which of two LoRAs acts. Torch only.

Scores depend on the weights alone, so the whole schedule is one comparison made before the first step:

    content_wins[t, l] = content_score[l] > bias * scale[t] * gamma * style_score[l]

Knows no module tree, no pipeline and no file.   Shape suffixes: O outputs, I inputs, R rank, L layers, T steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.errors import LoRAError, RequestError
from klora.lora import LoRA, LowRank, Plan

BLOCK_ELEMENTS = 1 << 20  # of dW at a time: 4 MB in fp32, a dozen with its working copies, whatever the layer's size
CUDA_BLOCK_ELEMENTS = 1 << 26  # there a block costs some thirty launches, and a layer as a whole is one
RANKS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)  # of partners, as people train them; of another a LoRA is scored when met

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

    def scale(self, tau: Tensor) -> Tensor:
        """S(tau), elementwise; tau in [0, 1]."""
        line = self.alpha * tau + self.beta
        return line % self.alpha if self.wraps else line


@dataclass(frozen=True)
class Fusion:
    """Two LoRAs, scored against each other layer by layer.

    layers: L names in execution order.   content_score, style_score: float64 [L], on the CPU; 0 where a LoRA lacks the
    layer, so that the one comparison leaves it with its owner.   gamma: the magnitude ratio (Eq 9), of gammas the one
    that was asked for.
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
        """R = content_score / (gamma * style_score), float64 [L]: inf for content's own layers, 0 for style's own."""
        return self.content_score / (self.gamma * self.style_score)

    def content_wins(self, schedule: Schedule, steps: int, style_bias: float = 1.0, clock: Clock = "step") -> Tensor:
        """True where content acts, bool [T, L]. A tie is style's, as in the published code.

        clock "step": tau is the step's midpoint, one tau a step.   clock "reference": tau moves at every layer call,
        1, 2, ... modulo T * L, as in the published code, whose very last call therefore falls back to tau = 0.
        """
        scale = schedule.scale(_tau(steps, len(self.layers), clock))
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
        """The gates of both LoRAs. The scales multiply what is applied and never enter the choice."""
        return self.gated(self.content_wins(schedule, steps, style_bias, clock), content_scale, style_scale)

    def gated(self, wins: Tensor, content_scale: float = 1.0, style_scale: float = 1.0) -> Plan:
        """The gates for a choice that has been made. wins: content_wins()'s bool [T, L]."""
        gates = torch.stack([wins * float(content_scale), ~wins * float(style_scale)], dim=-1)
        return Plan(self.layers, (self.content, self.style), gates, wins)


def fuse(
    content: Mapping[str, LowRank],
    style: Mapping[str, LowRank],
    gamma: Gamma = "reference",
    device: torch.device | None = None,
) -> Fusion:
    """Score two LoRAs of one base, both in execution order, where a LoRA does not remember its scores.

    K = r_content * r_style per layer (Eq 5). gamma "reference": the mean over shared layers of the per-layer L1 ratios,
    those of at least 3 times their mean dropped, as in the published code; "paper": the ratio of the sums (Eq 9).
    device: where what is not known yet is computed, one that has float64; None: where the factors lie. The scores are
    those of the CPU up to the rounding of float32 products.
    """
    layers = _merged_order(list(content), list(style))
    content_ranks, style_ranks = ({name: pair.rank for name, pair in lora.items()} for lora in (content, style))
    ks = {name: content_ranks.get(name, 1) * style_ranks.get(name, 1) for name in layers}
    (content_score, content_l1), (style_score, style_l1) = (_scores(lora, ks, device) for lora in (content, style))
    if not torch.stack([content_l1, style_l1]).isfinite().all():
        raise LoRAError("A LoRA's weights are so large that they overflow. Expected one that was trained.")
    gammas = _gammas(content_l1, style_l1)
    return Fusion(tuple(layers), content, style, content_score, style_score, gammas[gamma], gammas)


def _scores(lora: Mapping[str, LowRank], ks: Mapping[str, int], device: torch.device | None) -> Tensor:
    """Each layer's importance at its K, and its L1: float64 [2, L], on the CPU; 0 where the LoRA lacks the layer.

    What is computed a LoRA remembers, for partners of all RANKS: it depends on nothing else.
    """
    known = lora.scores if isinstance(lora, LoRA) else {}
    asked = {name: (ks[name], pair.numel) for name, pair in lora.items()}
    missing = {
        name: sorted({*wanted, *(lora[name].rank * rank for rank in RANKS)} - known.get(name, {}).keys())
        for name, wanted in asked.items()
        if not known.get(name, {}).keys() >= {*wanted}
    }
    if missing:  # brought to the CPU together: a GPU is waited for once
        sums = torch.cat([importance(lora[name], new, device) for name, new in missing.items()]).cpu()
        for (name, new), of_layer in zip(missing.items(), sums.split([*map(len, missing.values())]), strict=True):
            known.setdefault(name, {}).update(zip(new, of_layer.tolist(), strict=True))
    found = [[known[name][k] for k in asked[name]] if name in asked else [0.0, 0.0] for name in ks]
    return torch.tensor(found, dtype=torch.float64).view(-1, 2).T


def importance(pair: LowRank, ks: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Sum of the k largest |dW| (Eq 3) for each of ks, of all where there are no more: float64 [len(ks)]. Exact.

    Products in float32, row block by row block, once for all ks. device: theirs and the result's; None: the factors'.
    No shape depends on a value, so that nothing here waits for a GPU.
    """
    A, B = (factor.to(device, torch.float32, non_blocking=factor.is_cpu) for factor in (pair.A, pair.B))
    most = max((k for k in ks if k < pair.numel), default=0)
    top, l1 = A.new_empty(0), A.new_zeros((), dtype=torch.float64)
    for rows in B.split(max(1, (CUDA_BLOCK_ELEMENTS if A.is_cuda else BLOCK_ELEMENTS) // A.shape[1])):
        magnitudes = (rows @ A).abs_()
        l1 += magnitudes.sum(1, dtype=torch.float64).sum()
        top = _largest(magnitudes.flatten(), top, most)
    sums = F.pad(top.sort(descending=True).values.cumsum(0, dtype=torch.float64), (1, 0))
    return torch.stack([sums[k] if k < pair.numel else l1 for k in ks])


def _largest(magnitudes: Tensor, top: Tensor, k: int) -> Tensor:
    """The k largest of a block [N] and of those seen before, in no order.

    Those of the block lie in the k of its groups that have the largest maxima; groups of sqrt(N / k) leave the fewest
    candidates, for top-k is what costs.
    """
    size = max(1, isqrt(len(magnitudes) // max(1, k)))
    even = len(magnitudes) // size * size
    groups = magnitudes[:even].view(size, -1)
    best = groups.amax(0).topk(min(k, groups.shape[1]), sorted=False).indices
    top = torch.cat([top, groups.index_select(1, best).flatten(), magnitudes[even:]])
    return top.topk(min(k, len(top)), sorted=False).values


def _gammas(content_l1: Tensor, style_l1: Tensor) -> dict[Gamma, float]:
    """The magnitude ratio over shared layers, by either definition; layers where either LoRA is zero say nothing."""
    shared = (content_l1 > 0) & (style_l1 > 0)
    if not shared.any():
        return {"reference": 1.0, "paper": 1.0}  # every layer has one owner: there is nothing to choose
    content_l1, style_l1 = content_l1[shared], style_l1[shared]
    ratios = content_l1 / style_l1
    typical = ratios[ratios < 3 * ratios.mean()]
    return {"reference": typical.mean().item(), "paper": (content_l1.sum() / style_l1.sum()).item()}


def _tau(steps: int, layers: int, clock: Clock) -> Tensor:
    """Progress of denoising at each decision, float64 [T, L] or [T, 1]."""
    if clock == "step":
        return ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)[:, None]
    calls = torch.arange(1, steps * layers + 1, dtype=torch.float64)
    return (calls % (steps * layers) / (steps * layers)).view(steps, layers)


def _merged_order(first: list[str], second: list[str]) -> list[str]:
    """Both lists in one, keeping the order of each; they share one order, that of execution."""
    merged: dict[str, None] = {}
    shared, rest = set(second), iter(second)
    for name in first:
        if name in shared and name not in merged:
            merged |= dict.fromkeys(takewhile(name.__ne__, rest))
        merged[name] = None
    return list(merged | dict.fromkeys(rest))
