"""Which LoRA acts in a layer at a step, against the schedule in closed form."""

import random
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch

from klora.errors import RequestError
from klora.fusion import Schedule, fuse
from test_folder.fusion.drawn import SCHEDULES, flips, midpoints, random_pair, random_pairs, some_ratios, with_ratios


def test_layer_of_pattern_s_turns_to_style_once_at_its_own_time():
    ratios, schedule = some_ratios(), Schedule.from_pattern("s")
    wins = with_ratios(ratios, style_score=3.0, gamma=0.01).content_wins(schedule, 1000)
    turns = (ratios - schedule.beta) / schedule.alpha
    assert torch.equal(wins, midpoints(1000)[:, None] < turns)
    assert flips(wins).unique().tolist() == [0, 1]


def test_layer_of_pattern_s_star_changes_hands_at_most_twice_at_its_own_times():
    ratios, (alpha, beta) = some_ratios(), (1.5, 1.275)
    wrap = 1 - beta / alpha
    expected = []
    for ratio in ratios.tolist():
        if ratio > alpha:
            turns = []
        elif ratio > beta:
            turns = [(ratio - beta) / alpha, wrap]
        else:
            turns = [wrap, wrap + ratio / alpha]
        turned = [sum(turn < tau for turn in turns) for tau in midpoints(1000).tolist()]
        expected.append([(ratio > beta) ^ (count % 2 == 1) for count in turned])
    wins = with_ratios(ratios).content_wins(Schedule.from_pattern("s*"), 1000)
    assert torch.equal(wins, torch.tensor(expected).T)
    assert flips(wins).max() == 2


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.275, 1.5, 2.9])
def test_share_of_style_in_s_star_does_not_depend_on_beta(beta):
    ratios, alpha, steps = some_ratios(), 1.5, 1000
    wins = with_ratios(ratios).content_wins(Schedule.from_pattern("s*", alpha, beta), steps)
    share = 1 - wins.double().mean(0)
    # one step: the scales are `steps` equally spaced points on a circle of circumference alpha
    torch.testing.assert_close(share, 1 - ratios.clamp(max=alpha) / alpha, rtol=0, atol=1 / steps)


@pytest.mark.parametrize("bias", [0.3, 1.0, 1.7, 2.0])
def test_style_bias_multiplies_alpha_and_beta_of_pattern_s(bias):
    fusion = with_ratios(some_ratios())
    biased = fusion.content_wins(Schedule.from_pattern("s"), 50, style_bias=bias)
    assert torch.equal(biased, fusion.content_wins(Schedule.from_pattern("s", 1.5 * bias, 0.5 * bias), 50))


@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_more_style_bias_never_gives_a_layer_to_content(pattern):
    fusion, schedule = with_ratios(some_ratios()), Schedule.from_pattern(pattern)
    wins = [fusion.content_wins(schedule, 50, style_bias=bias) for bias in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert all((more <= less).all() and (more < less).any() for less, more in pairwise(wins))


@pytest.mark.parametrize("clock", ["step", "reference"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, 1.3), (0.0, 2.0), (1.0, 0.0)], ids=str)
def test_scales_multiply_the_gates_and_never_enter_the_choice(scales, clock):
    fusion, schedule = fuse(random_pairs(30, 4, seed=1), random_pairs(30, 4, seed=2)), Schedule.from_pattern("s")
    wins = fusion.content_wins(schedule, 20, style_bias=1.2, clock=clock)
    plan = fusion.plan(schedule, steps=20, content_scale=scales[0], style_scale=scales[1], style_bias=1.2, clock=clock)
    assert torch.equal(plan.gates[..., 0], torch.where(wins, scales[0], 0.0))
    assert torch.equal(plan.gates[..., 1], torch.where(wins, 0.0, scales[1]))
    assert (plan.layers, plan.loras) == (fusion.layers, (fusion.content, fusion.style))


def test_gates_are_float32_whatever_torchs_default_dtype_is(bfloat16_by_default):
    fusion = fuse(random_pairs(3, 4, seed=1), random_pairs(3, 4, seed=2))
    wins = torch.tensor([[True, False, True]])
    expected = torch.tensor([[[0.7, 0], [0, 1.3], [0.7, 0]]], dtype=torch.float32)
    torch.testing.assert_close(fusion.gated(wins, 0.7, 1.3).gates, expected, rtol=0, atol=0)


def test_step_clock_reads_the_schedule_at_the_midpoint_of_every_step():
    steps, schedule = 8, Schedule.from_pattern("s", alpha=1.0, beta=0.0)
    ties = with_ratios(midpoints(steps)).content_wins(schedule, steps)
    above = with_ratios(midpoints(steps) + 1e-9).content_wins(schedule, steps)
    assert torch.equal(ties, torch.ones(steps, steps, dtype=torch.bool).triu(1))
    assert torch.equal(above, torch.ones(steps, steps, dtype=torch.bool).triu())


def test_tie_goes_to_style():
    schedule = Schedule.from_pattern("s", alpha=0.0, beta=1.0)
    assert with_ratios([1.0, 1.0 + 1e-12]).content_wins(schedule, 1).tolist() == [[False, True]]


@pytest.mark.parametrize("clock", ["step", "reference"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, ("s*", 1.0, 0.75)], ids=str)
def test_layer_of_one_lora_stays_with_it_at_every_step(schedule, clock):
    fusion = fuse({"content's": random_pair(3, 4, 2)}, {"style's": random_pair(3, 4, 2)})
    wins = fusion.content_wins(Schedule.from_pattern(*schedule), 2, clock=clock)
    own = {name: wins[:, index].tolist() for index, name in enumerate(fusion.layers)}
    assert own == {"content's": [True, True], "style's": [False, False]}
    assert dict(zip(fusion.layers, fusion.ratio.tolist(), strict=True)) == {"content's": float("inf"), "style's": 0.0}


def test_scale_of_s_star_touches_zero_in_the_test_above():
    assert Schedule.from_pattern("s*", 1.0, 0.75).scale(midpoints(2)).tolist() == [0.0, 0.5]


def test_shared_layer_is_content_s_where_the_scale_is_zero():
    wins = with_ratios([1e-9, 0.0]).content_wins(Schedule.from_pattern("s*", 1.0, 0.75), 2)
    assert wins.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("seed", range(20))
def test_layers_keep_the_order_of_both_loras(seed):
    draw = random.Random(seed)
    execution = [f"layer.{number}" for number in draw.sample(range(100), 30)]
    chosen = [[name for name in execution if draw.random() < 0.5] for _ in range(2)]
    pair = random_pair(2, 2, 1)
    layers = fuse(*(dict.fromkeys(names, pair) for names in chosen)).layers
    assert sorted(layers) == sorted({*chosen[0], *chosen[1]})
    for names in chosen:
        assert [name for name in layers if name in names] == names


def test_fusion_holds_the_loras_it_was_given():
    content, style = random_pairs(2, 2, seed=1), random_pairs(2, 2, seed=2)
    fusion = fuse(content, style)
    assert isinstance(fusion.content, Mapping)
    assert fusion.content is content
    assert fusion.style is style


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"clock": "steps"}, "clock is 'steps'. Expected 'step' or 'reference'."),
        ({"steps": 0}, "steps is 0 and style_bias 1.0. Expected 1 or more, and a number >= 0."),
        ({"style_bias": float("nan")}, "steps is 4 and style_bias nan. Expected 1 or more, and a number >= 0."),
        ({"style_bias": float("inf")}, "steps is 4 and style_bias inf. Expected 1 or more, and a number >= 0."),
        ({"style_bias": -0.1}, "steps is 4 and style_bias -0.1. Expected 1 or more, and a number >= 0."),
    ],
)
def test_what_no_choice_can_be_made_by_is_refused_and_not_taken_for_something_else(wrong, sentence):
    with pytest.raises(RequestError) as refusal:
        with_ratios(some_ratios()).plan(Schedule.from_pattern("s"), **({"steps": 4} | wrong))
    assert str(refusal.value) == sentence


def test_a_bias_of_zero_leaves_nothing_to_style():
    assert with_ratios(some_ratios()).content_wins(Schedule.from_pattern("s"), 4, 0.0).all()


def test_a_gamma_that_there_is_not_is_refused():
    with pytest.raises(RequestError, match=r"^gamma is 'mean'\. Expected 'reference' or 'paper'\.$"):
        fuse({}, {}, gamma="mean")
