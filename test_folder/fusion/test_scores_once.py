"""A LoRA is scored once, for partners of every common rank; what it remembers is what would be computed again."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from klora import fusion as subject
from klora.form.request import Request
from klora.fusion import RANKS, Fusion, fuse, importance
from klora.generation import combine
from klora.lora import LoRA, LowRank
from test_folder.fusion.drawn import full_sort

META = torch.device("meta")  # its tensors have shapes alone: whoever asks for a value fails
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = {"square": (30, 30), "tall": (60, 20), "wide": (8, 150)}


def drawn(rank: int, seed: int) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return LoRA({name: LowRank(draw(rank, columns), draw(rows, rank)) for name, (rows, columns) in SHAPES.items()})


def without_weights(lora: LoRA) -> LoRA:
    """The same shapes and what it remembers, so that whatever multiplies its factors fails."""
    layers = {name: LowRank(pair.A.to(META), pair.B.to(META)) for name, pair in lora.items()}
    return LoRA(layers, scores=lora.scores)


def same(first: Fusion, second: Fusion) -> bool:
    """To the last bit."""
    return (
        torch.equal(first.content_score, second.content_score)
        and torch.equal(first.style_score, second.style_score)
        and first.gamma == second.gamma
    )


class Calls(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function is torch.ops.aten.bmm.default
        return function(*args, **(kwargs or {}))


# Importance, of many K at once


@settings(max_examples=150)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 5),
    largest=st.integers(0, 50),
    block=st.integers(1, 1700),
    ks=st.lists(st.integers(0, 2000), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
@example(rows=40, columns=40, rank=3, largest=0, block=999, ks=[1, 1600], dtype=torch.float32, seed=0)  # a zero layer
@example(rows=40, columns=1, rank=1, largest=1, block=7, ks=[39, 40, 41], dtype=torch.float16, seed=0)
@example(rows=1, columns=40, rank=1, largest=3, block=7, ks=[3, 2, 1], dtype=torch.bfloat16, seed=0)
def test_every_sum_of_one_pass_is_exactly_that_of_a_sorted_float64_product(
    rows: int, columns: int, rank: int, largest: int, block: int, ks: list[int], dtype: torch.dtype, seed: int
) -> None:
    """Of whole numbers, many of which are tied: their products and sums have no rounding, in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)  # noqa: E731
    pair = LowRank(whole(rank, columns), whole(rows, rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "BLOCK_ELEMENTS", block)
        assert torch.equal(importance([pair], ks)[0], torch.stack([full_sort(pair, k)[0] for k in ks]))


@pytest.mark.parametrize("size", [(700, 2000), (2000, 700), (1100, 1000)], ids=str)
def test_large_layers_of_uneven_magnitude_equal_the_oracle(size: tuple[int, int]) -> None:
    """More than a block, blocks that do not divide, and rows that hold nearly all that is large."""
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(size[0], 8, generator=generator) * torch.exp(2 * torch.randn(size[0], 1, generator=generator))
    pair = LowRank(torch.randn(8, size[1], generator=generator), B)
    ks = [*(8 * rank for rank in RANKS), 333, pair.numel - 1, pair.numel]
    expected = torch.stack([full_sort(pair, k)[0] for k in ks])
    torch.testing.assert_close(importance([pair], ks)[0], expected, rtol=1e-6, atol=0)  # float32 products


def test_sums_are_float64() -> None:
    """Of odd numbers that take all the bits of a float32, so that no sum of two or more fits in one."""
    odd = 2**24 - 1 - 2 * torch.arange(9.0)
    pair, ks = LowRank(torch.ones(1, 3), odd[:, None]), list(range(28))
    assert torch.equal(importance([pair], ks)[0], torch.stack([full_sort(pair, k)[0] for k in ks]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_computes_the_same(device: str) -> None:
    pair = drawn(8, seed=0)["square"]
    found = importance([pair], [1, 64, pair.numel], torch.device(device))
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), importance([pair], [1, 64, pair.numel]), rtol=1e-6, atol=0)


def test_no_value_is_waited_for_before_all_layers_of_a_lora_are_on_their_way() -> None:
    content, style = drawn(4, seed=1), drawn(4, seed=2)
    with Calls() as calls, pytest.raises(NotImplementedError, match="meta"):
        fuse(content, style, device=META)
    assert calls.products == len(SHAPES)
    assert content.scores == {}


# What a LoRA remembers


@pytest.mark.parametrize("rank", RANKS)
def test_a_known_pair_of_common_ranks_is_decided_without_its_weights(rank: int) -> None:
    content, style = drawn(4, seed=1), drawn(rank, seed=2)
    fuse(content, drawn(1, seed=3))
    fuse(drawn(16, seed=4), style)
    known = fuse(without_weights(content), without_weights(style))
    assert same(known, fuse(dict(content), dict(style)))
    for index, name in enumerate(SHAPES):
        expected = torch.stack([full_sort(content[name], 4 * rank)[0], full_sort(style[name], 4 * rank)[0]])
        found = torch.stack([known.content_score[index], known.style_score[index]])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_partner_of_another_rank_costs_one_product_a_layer_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    content, style = drawn(4, seed=1), drawn(5, seed=2)
    fuse(content, drawn(8, seed=3))
    fuse(drawn(8, seed=4), style)
    known = {name: dict(sums) for name, sums in content.scores.items()}
    asked: set[tuple[int, ...]] = set()
    monkeypatch.setattr(subject, "importance", lambda pairs, ks, device: asked.add(ks) or importance(pairs, ks, device))
    with Calls() as calls:
        first = fuse(content, style)
    assert asked == {(20,)}  # what is known is not looked for again
    assert calls.products == len(SHAPES)  # the content's: its own rank is one that the style was scored for
    assert all({*sums} - {*known[name]} == {20} for name, sums in content.scores.items())
    assert same(first, fuse(without_weights(content), without_weights(style)))
    assert same(first, fuse(dict(content), dict(style)))


def test_a_layer_without_a_partner_is_scored_for_partners_to_come() -> None:
    content, style = drawn(4, seed=1), drawn(4, seed=2)
    fuse(content, LoRA({}))
    fuse(LoRA({}), style)
    assert same(fuse(without_weights(content), without_weights(style)), fuse(dict(content), dict(style)))


def test_plain_mappings_remember_nothing() -> None:
    content = drawn(4, seed=1)
    fuse(dict(content), dict(drawn(4, seed=2)))
    assert content.scores == {}


# Where a request scores


@pytest.mark.parametrize("device", [None, torch.device("cpu"), META, torch.device("mps")], ids=str)
def test_a_request_scores_where_the_factors_lie_unless_its_denoiser_is_on_cuda(device: torch.device | None) -> None:
    content, style = drawn(4, seed=1), drawn(4, seed=2)
    combine(Request(prompt="a dog"), 4, content, style, device=device)
    assert same(fuse(without_weights(content), without_weights(style)), fuse(dict(content), dict(style)))


def test_a_request_scores_on_its_denoiser_s_cuda_device() -> None:
    content, style, device = drawn(4, seed=1), drawn(4, seed=2), torch.device("cuda")
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):  # torch's own, for want of one
            combine(Request(prompt="a dog"), 4, content, style, device=device)
        return
    combine(Request(prompt="a dog"), 4, content, style, device=device)
    expected = fuse(dict(content), dict(style)).content_score
    torch.testing.assert_close(fuse(content, style).content_score, expected, rtol=1e-6, atol=0)
