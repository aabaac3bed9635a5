"""Patterns, alpha and beta: defaults, and what no schedule can follow."""

import pytest

from klora.errors import RequestError
from klora.fusion import Schedule
from test_folder.fusion.drawn import SCHEDULES


@pytest.mark.parametrize(("pattern", "alpha", "beta"), SCHEDULES)
def test_defaults_are_the_published_ones(pattern, alpha, beta):
    assert Schedule.from_pattern(pattern) == Schedule(alpha, beta, wraps=pattern == "s*")


def test_auto_is_s_star():
    assert Schedule.from_pattern("auto") == Schedule.from_pattern("s*")


def test_zero_is_a_value_and_not_a_default():
    assert Schedule.from_pattern("s", 0.0, 0.0) == Schedule(0.0, 0.0, wraps=False)
    assert Schedule.from_pattern("s*", None, 0.0) == Schedule(1.5, 0.0, wraps=True)


@pytest.mark.parametrize(
    ("pattern", "alpha", "beta", "seen"),
    [
        ("S", None, None, "'S'"),
        ("", None, None, "''"),
        ("s", -0.1, None, "-0.1"),
        ("s", None, -2.0, "-2.0"),
        ("s", float("nan"), None, "nan"),
        ("s*", None, float("nan"), "nan"),
        ("s*", float("inf"), None, "inf"),
        ("s", None, float("inf"), "inf"),
        ("s*", 0.0, None, "0.0"),
        ("auto", 0.0, None, "0.0"),
    ],
)
def test_schedule_refuses_what_it_cannot_follow_and_says_what_was_seen(pattern, alpha, beta, seen):
    with pytest.raises(RequestError) as refusal:
        Schedule.from_pattern(pattern, alpha, beta)
    sentence = str(refusal.value)
    assert seen in sentence
    assert "Expected" in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
