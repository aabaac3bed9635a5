"""A fusion under a schedule, in numbers.   L layers, T steps.

R of a layer is content_score / (gamma * style_score). At step t style acts where R <= style_bias * S(tau): where a
layer's R lies among these T thresholds tells which LoRA acts in it at each step.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from klora.errors import RequestError
from klora.fusion import Fusion, Gamma, Schedule, style_share
from klora.lora import LowRank

Order = Literal["execution", "file"]
Counts = Mapping[float, int]

BIASES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_BIAS = 10.0  # that a request may ask for
BALANCED = 0.1  # how far from a half a style share still is about a half


@dataclass(frozen=True, eq=False)
class Report:
    """Shares are of all layers and steps, as a request's metric style_share is; each in [0, 1].

    layers: L names.   order: "execution", or "file", that is by name, without a base.   owner: "both", "content" or
    "style", L of them.   ratio: R, float64 [L]; inf for content's own layers and where style is zero, 0 for style's.
    thresholds: style_bias * S(tau) of each step, float64 [T].   content_wins: bool [T, L].   ranks, alphas: {"content"
    or "style": {value: number of layers}}, alphas if known.   gamma: the fusion's; gammas: under both definitions.
    slider: {style_bias: style share}.   balance: the style_bias in (0, 10] at which style acts in about a half of all,
    to two digits; None where there is none.   warnings: sentences.
    """

    layers: tuple[str, ...]
    order: Order
    owner: tuple[str, ...]
    schedule: Schedule
    style_bias: float
    thresholds: Tensor
    ratio: Tensor
    content_wins: Tensor
    ranks: Mapping[str, Counts]
    alphas: Mapping[str, Counts]
    gamma: float
    gammas: Mapping[Gamma, float]
    slider: Mapping[float, float]
    balance: float | None
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """T."""
        return len(self.thresholds)

    @cached_property
    def owners(self) -> Counter[str]:
        """How many layers are in both LoRAs, in content alone, in style alone."""
        return Counter(self.owner)

    @cached_property
    def shared(self) -> Tensor:
        """Where K-LoRA has a choice: bool [L]."""
        return torch.tensor([owner == "both" for owner in self.owner], dtype=torch.bool)

    @cached_property
    def style_share_by_step(self) -> list[float]:
        """Of the layers, T of them; 0 where there are no layers."""
        return (~self.content_wins).double().mean(1).tolist() if self.layers else [0.0] * self.steps

    @cached_property
    def style_share(self) -> float | None:
        """Of all layers and steps; None where there are no layers, of which a request has no such metric either."""
        return style_share(self.content_wins)

    @cached_property
    def always(self) -> dict[str, int]:
        """How many shared layers are one LoRA's at every step: {"content": ..., "style": ...}."""
        wins = self.content_wins[:, self.shared]
        return {"content": int(wins.all(0).sum()), "style": int((~wins).all(0).sum())}

    @cached_property
    def quantiles(self) -> dict[float, float]:
        """Of R over the shared layers, each the R of some layer; {} where none is shared."""
        ratios = self.ratio[self.shared].sort().values
        return {q: ratios[round(q * (len(ratios) - 1))].item() for q in QUANTILES} if len(ratios) else {}

    def summary(self) -> str:
        """One line, for a log and for metrics."""
        shares, owners = self.style_share_by_step, self.owners
        share, ends = self.style_share, f"{shares[0]:.0%} at first, {shares[-1]:.0%} at last"
        acts = "no layer" if share is None else f"{share:.0%}, {ends}"
        low, middle, high = (f"{self.quantiles.get(q, math.nan):.2g}" for q in (0.05, 0.5, 0.95))
        never = sum(self.always.values()) / max(1, owners["both"])
        return (
            f"klora {self.schedule.pattern} alpha {self.schedule.alpha:g} beta {self.schedule.beta:g} style_bias "
            f"{self.style_bias:g} steps {self.steps}: {owners['both']} layers shared, {owners['content']} content's, "
            f"{owners['style']} style's; gamma {self.gamma:.3g} (reference {self.gammas['reference']:.3g}, paper "
            f"{self.gammas['paper']:.3g}); R {middle} ({low} to {high}); {never:.0%} never switch; "
            f"style acts in {acts}; "
            f"warnings {len(self.warnings)}"
        )

    @property
    def advised(self) -> list[str]:
        """The warnings as lines, for people."""
        return [f"warning: {text}" for text in self.warnings]

    def __str__(self) -> str:
        """In lines, for people."""
        slider = ", ".join(f"{bias:g} {share:.0%}" for bias, share in self.slider.items())
        half = f"about a half at {self.balance:g}" if self.balance else f"a half at none up to {MOST_BIAS:g}"
        return "\n".join([self.summary(), f"style's share by style_bias: {slider}; {half}", *self.advised])

    def to_json(self) -> dict[str, Any]:
        """Every number, for json.dumps(..., allow_nan=False): an R that is infinite is null; wins has a string for
        each step, with "c" or "s" for each layer."""
        ratio = [None if math.isinf(R) else R for R in self.ratio.tolist()]
        wins = ["".join("c" if won else "s" for won in step) for step in self.content_wins.tolist()]
        return {
            "pattern": self.schedule.pattern,
            "alpha": self.schedule.alpha,
            "beta": self.schedule.beta,
            "steps": self.steps,
            "style_bias": self.style_bias,
            "order": self.order,
            "layers": {name: self.owners[key] for name, key in _OWNERS.items()},
            **{f"{role}_only": self._owned(role) for role in ("content", "style")},
            "ranks": {role: _json(counts) for role, counts in self.ranks.items()},
            "alphas": {role: _json(counts) for role, counts in self.alphas.items()},
            "gamma": self.gamma,
            "gammas": dict(self.gammas),
            "ratio_quantiles": {f"{q:g}": None if math.isinf(R) else R for q, R in self.quantiles.items()},
            "always": self.always,
            "style_share": self.style_share,
            "style_share_by_step": self.style_share_by_step,
            "thresholds": self.thresholds.tolist(),
            "slider": _json(self.slider),
            "balance": self.balance,
            "ratio": dict(zip(self.layers, ratio, strict=True)),
            "wins": wins,
            "warnings": list(self.warnings),
        }

    def _owned(self, role: str) -> list[str]:
        return [name for name, owner in zip(self.layers, self.owner, strict=True) if owner == role]


_OWNERS = {"shared": "both", "content_only": "content", "style_only": "style"}


def measured(
    fusion: Fusion, schedule: Schedule, steps: int, style_bias: float, order: Order, alphas: Mapping[str, Counts]
) -> Report:
    """The report without its warnings; arguments as report_on() has them. Raises RequestError."""
    if steps < 1:
        raise RequestError(f"steps is {steps}. Expected at least 1.")
    if not 0 <= style_bias < math.inf:
        raise RequestError(f"style_bias is {style_bias}. Expected a number >= 0.")
    roles = {"content": fusion.content, "style": fusion.style}
    scale = schedule.by_step(steps)
    ratio = fusion.ratio.nan_to_num(nan=0.0, posinf=math.inf)  # 0 / 0: neither acts, and the choice calls it style's
    return Report(
        layers=fusion.layers,
        order=order,
        owner=tuple(_owner(name, **roles) for name in fusion.layers),
        schedule=schedule,
        style_bias=style_bias,
        thresholds=style_bias * scale,
        ratio=ratio,
        content_wins=fusion.content_wins(schedule, steps, style_bias),
        ranks={
            role: dict(sorted(Counter(pair.rank for pair in lora.values()).items())) for role, lora in roles.items()
        },
        alphas=alphas,
        gamma=fusion.gamma,
        gammas=fusion.gammas,
        slider={bias: style_share(fusion.content_wins(schedule, steps, bias)) or 0.0 for bias in BIASES},
        balance=_balance(ratio, scale),
    )


def _owner(name: str, content: Mapping[str, LowRank], style: Mapping[str, LowRank]) -> str:
    if name in content and name in style:
        return "both"
    return "content" if name in content else "style"


def _balance(ratio: Tensor, scale: Tensor) -> float | None:
    """Style acts at a step where style_bias >= R / S(tau): their median gives it half of all layers and steps."""
    biases = (ratio / scale[:, None]).nan_to_num(nan=0.0, posinf=math.inf).flatten()  # 0 / 0 is style's, as above
    if not len(biases):
        return None
    bias = float(f"{biases.median().item():.2g}")
    share = (biases <= bias).double().mean().item()
    return bias if 0 < bias <= MOST_BIAS and abs(share - 0.5) <= BALANCED else None


def _json(counts: Counts | Mapping[float, float]) -> dict[str, float]:
    return {f"{key:g}": count for key, count in counts.items()}
