"""K-LoRA (arXiv:2502.18461): for every layer and denoising step, which of two LoRAs acts. Torch only.

Scores depend on the weights alone, so the whole schedule is one comparison made before the first step:

    content_wins[t, l] = content_score[l] > bias * scale[t] * gamma * style_score[l]

Knows no module tree, no pipeline and no file.   Shape suffixes: O outputs, I inputs, R rank, L layers, T steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import torch
from torch import Tensor

from klora.errors import RequestError
from klora.lora import LoRA, LowRank, Plan

BLOCK_ELEMENTS = 1 << 20  # of dW at a time: 4 MB in fp32, a dozen with its working copies, whatever the layer's size

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
    layer, so that the one comparison leaves it with its owner.   gamma: the magnitude ratio (Eq 9).
    """

    layers: tuple[str, ...]
    content: Mapping[str, LowRank]
    style: Mapping[str, LowRank]
    content_score: Tensor
    style_score: Tensor
    gamma: float

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
        return Plan(self.layers, (self.content, self.style), gates)


def fuse(content: Mapping[str, LowRank], style: Mapping[str, LowRank], gamma: Gamma = "reference") -> Fusion:
    """Score two LoRAs of one base, both in execution order.

    K = r_content * r_style per layer (Eq 5). gamma "reference": the mean over shared layers of the per-layer L1 ratios,
    those of at least 3 times their mean dropped, as in the published code; "paper": the ratio of the sums (Eq 9).
    """
    layers = _merged_order(list(content), list(style))
    scores = torch.zeros(2, 2, len(layers), dtype=torch.float64)  # [LoRA, (top-K sum, L1), layer]
    for index, name in enumerate(layers):
        pairs = [lora.get(name) for lora in (content, style)]
        k = max(1, *(pair.rank for pair in pairs if pair))
        if pairs[0] and pairs[1]:
            k = pairs[0].rank * pairs[1].rank
        for lora, owner in enumerate((content, style)):
            if name in owner:
                scores[lora, :, index] = torch.tensor(_score(owner, name, k), dtype=torch.float64)
    top, l1 = scores[:, 0], scores[:, 1]
    return Fusion(tuple(layers), content, style, top[0], top[1], _gamma(l1[0], l1[1], gamma))


def _score(lora: Mapping[str, LowRank], name: str, k: int) -> tuple[float, float]:
    """importance() of a layer, which a LoRA remembers: it depends on nothing else."""
    known = lora.scores if isinstance(lora, LoRA) else {}
    if (name, k) not in known:
        top, l1 = importance(lora[name], k).tolist()
        known[name, k] = (top, l1)
    return known[name, k]


def importance(pair: LowRank, k: int) -> Tensor:
    """Sum of the k largest |dW| (Eq 3) and sum of all |dW|: float64 [2], on the CPU. Exact.

    Products in float32, row block by row block; later blocks only keep what beats the k-th largest seen so far.
    """
    A, B = pair.A.float(), pair.B.float()
    top, l1 = A.new_empty(0), A.new_zeros((), dtype=torch.float64)
    for rows in B.split(max(1, BLOCK_ELEMENTS // A.shape[1])):
        magnitudes = (rows @ A).abs_().flatten()
        l1 += magnitudes.sum(dtype=torch.float64)
        if len(top) == k:
            magnitudes = magnitudes[magnitudes > top[-1]]
        top = torch.cat([top, magnitudes])
        top = top.topk(min(k, len(top))).values
    return torch.stack([top.sum(dtype=torch.float64), l1]).cpu()


def _gamma(content_l1: Tensor, style_l1: Tensor, kind: Gamma) -> float:
    """The magnitude ratio over shared layers; layers where either LoRA is zero say nothing about it."""
    shared = (content_l1 > 0) & (style_l1 > 0)
    if not shared.any():
        return 1.0  # every layer has one owner: there is nothing to choose
    content_l1, style_l1 = content_l1[shared], style_l1[shared]
    if kind == "paper":
        return (content_l1.sum() / style_l1.sum()).item()
    ratios = content_l1 / style_l1
    return ratios[ratios < 3 * ratios.mean()].mean().item()


def _tau(steps: int, layers: int, clock: Clock) -> Tensor:
    """Progress of denoising at each decision, float64 [T, L] or [T, 1]."""
    if clock == "step":
        return ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)[:, None]
    calls = torch.arange(1, steps * layers + 1, dtype=torch.float64)
    return (calls % (steps * layers) / (steps * layers)).view(steps, layers)


def _merged_order(first: list[str], second: list[str]) -> list[str]:
    """Both lists in one, keeping the order of each; they share one order, that of execution."""
    merged: list[str] = []
    for _, i, i_end, j, j_end in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        merged += first[i:i_end] + second[j:j_end]
    return list(dict.fromkeys(merged))
