"""The score of a layer: the sum of its product's largest elements, against a full sort of the dense product."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from klora import fusion as subject
from klora.fusion import fuse
from klora.lora import LowRank
from test_folder.fusion.drawn import full_sort, random_pair, top_and_l1


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


def test_the_device_may_be_named():
    content, style = {"a": random_pair(12, 8, 2, seed=1)}, {"a": random_pair(12, 8, 3, seed=3)}
    named, found = fuse(content, style, device="cpu"), fuse(content, style)
    assert torch.equal(named.content_score, found.content_score) and named.gamma == found.gamma
