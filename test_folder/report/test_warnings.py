"""A warning comes when it should, for its reason alone, with the advice that helps."""

from dataclasses import replace

import pytest
import torch

from klora.fusion import Schedule, fuse
from klora.lora import LowRank
from klora.report import report_on
from test_folder.report.reporting import healthy, made, names, reported


@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_a_healthy_pair_has_no_warnings(pattern):
    assert healthy(pattern=pattern).warnings == ()


def zeros(layers):
    return {name: LowRank(torch.randn(4, 24), torch.zeros(24, 4)) for name in layers}


ONE, OTHER = made(names(), seed=1), made(names(), seed=2)
WARNINGS = {
    "style far larger": (ONE, made(names(), seed=2, scale=85.0), {}, "Magnitudes differ 8", "lower style_scale."),
    "content far larger": (made(names(), seed=1, scale=40.0), OTHER, {}, "Magnitudes differ ", "lower content_scale."),
    "few content ranks": (ONE, made(names(), rank=128, seed=2), {}, "Ranks 4 (content) and 128 (style) favour content",
                          "up to 1.5x here. style_bias 1.5 allows for it."),
    "few style ranks": (made(names(), rank=128, seed=1), OTHER, {}, "Ranks 128 (content) and 4 (style) favour style",
                        "up to 1.5x here. style_bias 0.68 allows for it."),
    "few shared": (made(names()[:22], seed=1), made(names()[18:], seed=2), {}, "Only 4 of 40 layers are in both LoRAs",
                   "content always acts in its own 18, style in its own 18."),
    "none shared": (made(names()[:20]), made(names()[20:]), {}, "No layer is in both LoRAs (20 content's, 20 style's)",
                    "style_bias changes nothing."),
    "all alike": (ONE, ONE, {}, "All 40 shared layers are alike (R 1 to 1)", "as step 8 of 20 begins"),
    "one step": (ONE, OTHER, {"steps": 1}, "There is one step", "num_inference_steps more."),
    "content is zeros": (zeros(names()), OTHER, {}, "The content LoRA is all zeros", "Train it first."),
    "style is zeros": (ONE, zeros(names()), {}, "The style LoRA is all zeros", "Train it first."),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_each_warning_comes_for_its_reason_alone(case):
    content, style, options, begins, says = WARNINGS[case]
    (warning,) = reported(content, style, **options).warnings
    assert warning.startswith(begins) and says in warning


@pytest.mark.parametrize(("last", "warned"), [(30, False), (29, True)])
def test_half_of_the_layers_in_both_are_enough(last, warned):
    found = reported(made(names()[:last], seed=1), made(names()[10:], seed=2)).warnings
    assert any(warning.startswith("Only 19 of 40 layers") for warning in found) is warned


@pytest.mark.parametrize(("scale", "warned"), [(8.5, False), (11.5, True)])
def test_magnitudes_ten_times_apart_are_far(scale, warned):
    found = reported(ONE, made(names(), seed=2, scale=scale)).warnings
    assert any(warning.startswith("Magnitudes differ") for warning in found) is warned


@pytest.mark.parametrize(("count", "warned"), [(2, False), (3, True)])
def test_two_layers_that_switch_together_may_be_an_accident(count, warned):
    lora = made(names(count))
    assert any("shared layers are alike" in warning for warning in reported(lora, lora).warnings) is warned


def test_the_step_of_an_alike_pair_is_the_one_that_differs():
    wins = reported(ONE, ONE).content_wins
    assert wins[6].all() and not wins[7].any()  # 0-based


def test_an_alike_pair_that_one_lora_always_wins_is_told_to_move_the_style_bias():
    (warning,) = reported(ONE, ONE, style_bias=10.0).warnings
    assert warning.startswith("40 of 40 shared layers (100%) never switch: 0 are always content's, 40 always style's.")


@pytest.mark.parametrize(("low", "high"), [(4, 64), (2, 16)])
def test_few_ranks_are_favoured_as_the_warning_says(low, high):
    few, many = (made(names(4), rank=rank, seed=rank, spread=0.0, side=700) for rank in (low, high))
    favour = (1 + 2 / low) / (1 + 2 / high)
    assert fuse(few, many).ratio.mean().item() == pytest.approx(favour, rel=0.1)
    assert fuse(many, few).ratio.mean().item() == pytest.approx(1 / favour, rel=0.1)


def with_ratios(ratios):
    """A fusion whose R is as given."""
    fusion = fuse(ONE, OTHER)
    content = torch.tensor(ratios, dtype=torch.float64) * fusion.gamma * fusion.style_score
    return replace(fusion, content_score=content)


def report_of(fusion, style_bias=1.0):
    return report_on(fusion, Schedule.from_pattern("s"), 20, style_bias)


def test_layers_that_never_switch_are_told_with_the_style_bias_that_helps():
    fusion = with_ratios([6.0] * 24 + [0.1] * 4 + [0.7 + i / 10 for i in range(12)])
    report = report_of(fusion)
    (warning,) = report.warnings
    assert warning == (
        f"28 of 40 shared layers (70%) never switch: 24 are always content's, 4 always style's. Try style_bias "
        f"{report.balance:g}, which brings style's share from {report.style_share:.0%} to about a half."
    )
    assert report_of(fusion, report.balance).style_share == pytest.approx(0.5, abs=0.1)


def test_where_style_has_its_half_a_larger_alpha_is_advised():
    (warning,) = report_of(with_ratios([8.0, 0.125] * 20)).warnings
    assert warning.endswith("Style acts in 50% even so; a larger alpha lets more of them switch.")


def test_where_no_style_bias_helps_that_is_said():
    report = report_of(with_ratios([1000.0] * 30 + [0.001] * 10))
    assert report.balance is None
    assert report.warnings[0].endswith("Style acts in 25%, and no style_bias up to 10 brings that near a half.")
