"""Parity with the published code: its counter of layer calls, and where ours leaves it."""

import numpy as np
import pytest
import torch

from klora.fusion import Schedule, fuse
from test_folder.fusion.drawn import SCHEDULES, naive_gamma, naive_sums, random_pairs, with_ratios


class PublishedRule:
    """The published code's choice, from its formulas: a counter of layer calls stands in for the time."""

    def __init__(self, pattern, alpha, beta, total):
        self.pattern, self.alpha, self.beta, self.total = pattern, alpha, beta, total
        self.count = 0

    def content_acts(self, content_sum, style_sum, gamma):
        self.count += 1
        scale = self.alpha * ((self.count % self.total) / self.total) + self.beta
        if self.pattern == "s*":
            scale %= self.alpha
        with np.errstate(divide="ignore"):
            return bool((content_sum / gamma) / (style_sum * np.float64(scale)) > 1)


@pytest.mark.parametrize("ranks", [(8, 8), (4, 16)], ids=str)
@pytest.mark.parametrize(("pattern", "alpha", "beta"), SCHEDULES)
def test_reference_clock_takes_all_28000_decisions_of_the_published_counter(pattern, alpha, beta, ranks):
    layers, steps = 560, 50
    content, style = random_pairs(layers, ranks[0], seed=1), random_pairs(layers, ranks[1], seed=2)
    sums = naive_sums(content, style)
    gamma, rule = naive_gamma(sums), PublishedRule(pattern, alpha, beta, total=layers * steps)
    expected = [[rule.content_acts(*layer[:2], gamma) for layer in sums] for _ in range(steps)]
    wins = fuse(content, style).content_wins(Schedule.from_pattern(pattern), steps, clock="reference")
    assert torch.equal(wins, torch.tensor(expected))
    assert 0.1 < wins.double().mean() < 0.9


def test_reference_clock_falls_back_to_the_start_at_the_very_last_call_of_s():
    wins = with_ratios([1.0] * 5).content_wins(Schedule.from_pattern("s"), 50, clock="reference")
    assert wins[-1].tolist() == [False, False, False, False, True]


def test_step_clock_does_not_fall_back_at_the_end():
    wins = with_ratios([1.0] * 5).content_wins(Schedule.from_pattern("s"), 50)
    assert wins[-1].tolist() == [False] * 5
