"""The choice is the paper's and the published code's: every number against the mathematics or a naive computation."""

import random
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from klora import fusion as subject
from klora.errors import RequestError
from klora.fusion import Fusion, Schedule, fuse, importance
from klora.lora import LowRank
from test_folder import tiny

SCHEDULES = [("s", 1.5, 0.5), ("s*", 1.5, 1.275)]


def random_pair(rows, columns, rank, seed=0):
    return LowRank(*tiny.random_lora({"layer": (rows, columns)}, rank, seed=seed)["layer"])


def whole_number_pair(rows, columns, rank):
    """Entries in -3 .. 3: float32 products are exact, and many are equal."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((rank, columns), (rows, rank)))
    return LowRank(A, B)


def random_pairs(layers, rank, seed, spread=0.0):
    """{name: LowRank} of `layers` layers of three shapes; spread: of the logarithm of a layer's magnitude."""
    shapes = {f"block.{index}": [(12, 8), (8, 16), (10, 10)][index % 3] for index in range(layers)}
    factors = torch.exp(spread * torch.randn(layers, generator=torch.Generator().manual_seed(seed)))
    drawn = tiny.random_lora(shapes, rank, seed=seed)
    return {name: LowRank(A, B * factor) for (name, (A, B)), factor in zip(drawn.items(), factors, strict=True)}


def dense_magnitudes(pair):
    """|B A| as a float64 vector, computed all at once."""
    return (pair.B.double() @ pair.A.double()).abs().flatten()


def top_and_l1(pair, k):
    """The subject's (sum of the k largest |dW|, sum of all)."""
    return importance(pair, [k, pair.numel])


def full_sort(pair, k):
    """(sum of the k largest |dW|, sum of all)."""
    magnitudes = dense_magnitudes(pair).sort(descending=True).values
    return torch.stack([magnitudes[:k].sum(), magnitudes.sum()])


def with_ratios(ratios, style_score=1.0, gamma=1.0):
    """A Fusion whose R is given."""
    style = torch.full((len(ratios),), style_score, dtype=torch.float64)
    content = torch.as_tensor(ratios, dtype=torch.float64) * style * gamma
    return Fusion(tuple(f"layer.{index}" for index in range(len(ratios))), {}, {}, content, style, gamma)


def flips(wins):
    """How often each layer changes hands: [L]."""
    return (wins[1:] != wins[:-1]).sum(0)


# Importance


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 7, 1), (6, 5, 4), (300, 40, 8), (40, 300, 64), (5, 4, 9), (2400, 1000, 8)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("k", [1, 2, 64, 10**9])
def test_importance_equals_a_full_sort_of_the_dense_product(rows, columns, rank, k):
    pair = random_pair(rows, columns, rank)
    # 1e-6: the products are float32 (2**-24 each), the oracle's float64.
    torch.testing.assert_close(top_and_l1(pair, k), full_sort(pair, k), rtol=1e-6, atol=0)


@pytest.mark.parametrize("block_elements", [1, 7, 40, 41, 1000, 1 << 20])
@pytest.mark.parametrize("k", [1, 3, 100, 1599, 1600, 1601])
def test_importance_of_whole_numbers_is_exact_for_every_block_size(monkeypatch, block_elements, k):
    monkeypatch.setattr(subject, "BLOCK_ELEMENTS", block_elements)
    pair = whole_number_pair(rows=40, columns=40, rank=3)
    assert torch.equal(top_and_l1(pair, k), full_sort(pair, k))


def test_importance_selects_the_very_elements_that_a_full_sort_selects(monkeypatch):
    """Powers of two: the sum of the selected elements spells, in binary, which ones they are."""
    exponents = torch.randperm(50, generator=torch.Generator().manual_seed(0)).double()
    pair = LowRank(torch.ones(1, 1), (2.0**exponents * (-1) ** exponents).float()[:, None])
    monkeypatch.setattr(subject, "BLOCK_ELEMENTS", 10)
    for k in range(1, 51):
        assert top_and_l1(pair, k)[0] == sum(2.0**exponent for exponent in range(50 - k, 50))


def test_importance_never_holds_more_of_the_product_than_a_block(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
                if isinstance(output, Tensor):
                    self.elements = max(self.elements, output.numel())
            return outputs

    monkeypatch.setattr(subject, "BLOCK_ELEMENTS", 4000)
    pair, k = random_pair(rows=500, columns=400, rank=2), 16
    with Largest() as largest:
        top_and_l1(pair, k)
    assert 4000 <= largest.elements <= 4000 + k


@pytest.mark.parametrize("factor", [0.5, 1.7, 32.0])
def test_alpha_folded_into_b_multiplies_the_scores(factor):
    pair = random_pair(30, 20, 4)
    scaled = LowRank(pair.A, pair.B * factor)
    torch.testing.assert_close(top_and_l1(scaled, 16), factor * top_and_l1(pair, 16), rtol=1e-6, atol=0)  # float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_float32(dtype):
    drawn = random_pair(30, 20, 4)
    half = LowRank(drawn.A.to(dtype), drawn.B.to(dtype))
    assert torch.equal(top_and_l1(half, 16), top_and_l1(LowRank(half.A.float(), half.B.float()), 16))


def test_scores_are_the_sums_of_rank_times_rank_elements_of_each_layer_s_own_ranks():
    content = {"a": random_pair(12, 8, 2, seed=1), "b": random_pair(12, 8, 5, seed=2)}
    style = {"a": random_pair(12, 8, 3, seed=3), "b": random_pair(12, 8, 1, seed=4)}
    fusion = fuse(content, style)
    for index, (name, k) in enumerate({"a": 2 * 3, "b": 5 * 1}.items()):
        torch.testing.assert_close(fusion.content_score[index], full_sort(content[name], k)[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(fusion.style_score[index], full_sort(style[name], k)[0], rtol=1e-6, atol=0)


# Parity with the published code


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


def naive_sums(content, style):
    """[(content's top-K sum, style's, content's L1, style's)] of each layer, in float64."""
    sums = []
    for name, pair in content.items():
        (content_sum, content_l1), (style_sum, style_l1) = (
            full_sort(lora, pair.rank * style[name].rank).numpy() for lora in (pair, style[name])
        )
        sums.append((content_sum, style_sum, content_l1, style_l1))
    return sums


def naive_gamma(sums):
    ratios = [content_l1 / style_l1 for _, _, content_l1, style_l1 in sums]
    mean = sum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < 3 * mean]
    return sum(kept) / len(kept)


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


# Gamma


def test_reference_gamma_equals_the_naive_trimmed_mean():
    content, style = random_pairs(40, 4, seed=1, spread=1.5), random_pairs(40, 4, seed=2, spread=1.5)
    sums = naive_sums(content, style)
    ratios = torch.tensor([layer[2] / layer[3] for layer in sums])
    assert (ratios >= 3 * ratios.mean()).any()
    assert fuse(content, style).gamma == pytest.approx(naive_gamma(sums), rel=1e-6)  # float32 products


def test_paper_gamma_equals_the_ratio_of_the_grand_sums():
    content, style = random_pairs(40, 4, seed=1, spread=1.5), random_pairs(40, 4, seed=2, spread=1.5)
    _, _, content_l1, style_l1 = map(sum, zip(*naive_sums(content, style), strict=True))
    assert fuse(content, style, gamma="paper").gamma == pytest.approx(content_l1 / style_l1, rel=1e-6)


@pytest.mark.parametrize("gamma", ["reference", "paper"])
def test_gamma_is_that_of_the_layers_which_both_loras_change(gamma):
    content, style = random_pairs(6, 4, seed=1), random_pairs(6, 4, seed=2)
    alone = fuse(content, style, gamma=gamma).gamma
    zero = LowRank(torch.ones(2, 8), torch.zeros(12, 2))
    content |= {"zero here": zero, "zero there": random_pair(12, 8, 2), "content's own": random_pair(12, 8, 2)}
    style |= {"zero here": random_pair(12, 8, 2), "zero there": zero, "style's own": random_pair(12, 8, 2)}
    assert fuse(content, style, gamma=gamma).gamma == alone


@pytest.mark.parametrize("gamma", ["reference", "paper"])
def test_gamma_is_one_where_no_layer_is_shared(gamma):
    assert fuse({"a": random_pair(3, 4, 2)}, {"b": random_pair(3, 4, 2)}, gamma=gamma).gamma == 1.0
    assert fuse({}, {}, gamma=gamma).gamma == 1.0


@pytest.mark.parametrize("gamma", ["reference", "paper"])
@pytest.mark.parametrize("factors", [(100.0, 1.0), (1.0, 0.01)], ids=["content", "style"])
def test_ratio_does_not_depend_on_the_magnitude_of_either_lora(gamma, factors):
    loras = [random_pairs(40, 4, seed=seed, spread=1.5) for seed in (1, 2)]
    rescaled = [
        {name: LowRank(pair.A, pair.B * factor) for name, pair in lora.items()}
        for lora, factor in zip(loras, factors, strict=True)
    ]
    # 1e-5: float32 products, and a gamma of float32 products
    torch.testing.assert_close(fuse(*rescaled, gamma=gamma).ratio, fuse(*loras, gamma=gamma).ratio, rtol=1e-5, atol=0)


# The schedule, in closed form


def some_ratios():
    """R from well below the smallest scale to well above the largest."""
    return torch.exp(torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def midpoints(steps):
    return torch.tensor([(step + 0.5) / steps for step in range(steps)], dtype=torch.float64)


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


# Schedule


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
