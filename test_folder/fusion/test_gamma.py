"""The magnitude ratio of two LoRAs: the published code's trimmed mean, and the paper's ratio of sums."""

import pytest
import torch

from klora.fusion import fuse
from klora.lora import LowRank
from test_folder.fusion.drawn import naive_gamma, naive_sums, random_pair, random_pairs


def test_reference_gamma_equals_the_naive_trimmed_mean():
    content, style = random_pairs(40, 4, seed=1, spread=1.5), random_pairs(40, 4, seed=2, spread=1.5)
    sums = naive_sums(content, style)
    ratios = torch.tensor([layer[2] / layer[3] for layer in sums])
    assert (ratios >= 3 * ratios.mean()).any()
    assert fuse(content, style).gamma == pytest.approx(naive_gamma(sums), rel=1e-6)  # float32 products


def test_a_ratio_of_exactly_three_means_is_dropped():
    one, nine = (LowRank(torch.ones(1, 1), torch.full((1, 1), ratio)) for ratio in (1.0, 9.0))
    assert fuse(dict.fromkeys("abc", one) | {"d": nine}, dict.fromkeys("abcd", one)).gamma == 1.0


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
