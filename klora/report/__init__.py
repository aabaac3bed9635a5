"""What a fusion did: which LoRA acts where and when under a schedule, why, and what would change it.

numbers   what there is to say, as data      advice   warnings, in plain words
picture   the same to look at                pair     two files -> a report, with a base or without one
inspection   what one file is, and which bases read it
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from klora.fusion import Fusion, Schedule
from klora.report.advice import advice
from klora.report.numbers import Counts, Order, Report, measured

__all__ = ["Report", "report_on"]


def report_on(
    fusion: Fusion,
    schedule: Schedule,
    steps: int,
    style_bias: float = 1.0,
    *,
    order: Order = "execution",
    alphas: Mapping[str, Counts] = MappingProxyType({}),
) -> Report:
    """What a fusion of L layers comes to under a schedule, tau moving once a step. Draws nothing.

    steps: T >= 1, of the full schedule.   style_bias: finite, >= 0.   order: that of fusion.layers.
    alphas: {"content" or "style": {alpha: how many layers}}, as far as the files state them; a LowRank has none. Raises
    RequestError.
    """
    numbers = measured(fusion, schedule, steps, style_bias, order, alphas)
    return replace(numbers, warnings=advice(fusion, numbers))
