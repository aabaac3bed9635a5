"""Layers that are alike are scored together: each as if it were alone, and on a GPU for the launches of one."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from klora import fusion as subject
from klora.fusion import CUDA_BLOCK_ELEMENTS, RANKS, fuse, importance
from klora.lora import LoRA, LowRank

CUDA, META = torch.device("cuda"), torch.device("meta")
# SDXL's 560 attention linears: {(outputs, inputs): how many}.
SDXL = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}


def layers(count: int, rows: int, columns: int, rank: int, seed: int = 0) -> list[LowRank]:
    """Of uneven magnitude, so that no two have near sums."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return [LowRank(draw(rank, columns), draw(rows, rank) * 1.5**index) for index in range(count)]


def whole(count: int, rows: int, columns: int, rank: int) -> list[LowRank]:
    """Entries in -3 .. 3: float32 products and all sums are exact, and many are equal."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-3, 4, shape, generator=generator).float()  # noqa: E731
    return [LowRank(draw(rank, columns), draw(rows, rank)) for _ in range(count)]


def shapes_alone(counts: Mapping[tuple[int, int], int], rank: int, device: torch.device = META) -> dict[str, LowRank]:
    empty = lambda *shape: torch.empty(shape, dtype=torch.float16, device=device)  # noqa: E731
    return {
        f"{rows}.{columns}.{index}": LowRank(empty(rank, columns), empty(rows, rank))
        for (rows, columns), count in counts.items()
        for index in range(count)
    }


def naive(pairs: Sequence[LowRank], ks: Sequence[int]) -> Tensor:
    """Of each layer's whole product, sorted, in float64: [len(pairs), len(ks)]."""
    products = [(pair.B.double() @ pair.A.double()).abs().flatten().sort(descending=True).values for pair in pairs]
    return torch.stack([torch.stack([product[:k].sum() for k in ks]) for product in products])


def bounds(monkeypatch: pytest.MonkeyPatch, block: int, batch: int) -> None:
    monkeypatch.setattr(subject, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(subject, "BATCH_ELEMENTS", batch)


class Dispatched(TorchDispatchMode):
    """Counts operations; keeps the sizes of the products [layers, rows, columns], and whether moves do not block."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[torch.Size] = []
        self.moves: list[bool] = []
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.counts[function.overloadpacket.__name__] += 1
        if function is torch.ops.aten.bmm.default:
            self.products.append(outputs.shape)
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == META:
            self.moves.append(kwargs.get("non_blocking", False))
        return outputs


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, LowRank]], Dispatched]:
    """What scoring a LoRA asks of a GPU, which the meta device stands for: whoever asks it for a value fails."""
    stacked = subject._stacked
    monkeypatch.setattr(subject, "_stacked", lambda pairs, device: stacked(pairs, META))

    def dispatched(lora: Mapping[str, LowRank]) -> Dispatched:
        with Dispatched() as found, pytest.raises(NotImplementedError, match="meta"):  # the values, at the very end
            fuse(lora, {}, device=CUDA)
        return found

    return dispatched


# What a layer's sums are


@pytest.mark.parametrize("bound", [(1 << 20, 1 << 17), (1000, 1000), (300, 300), (1000, 100), (7, 7)], ids=str)
def test_every_layer_of_a_mixed_lora_has_its_own_sums(monkeypatch: pytest.MonkeyPatch, bound: tuple[int, int]) -> None:
    """Shapes and ranks that alternate; a product's transpose and its rank's double are not alike."""
    bounds(monkeypatch, *bound)
    kinds = [(12, 20, 2), (20, 12, 2), (12, 20, 4), (16, 15, 2), (1, 240, 1)]
    drawn = [layers(7, *kind, seed=seed) for seed, kind in enumerate(kinds)]
    content = {f"{depth}.{kind}": drawn[kind][depth] for depth in range(7) for kind in range(len(kinds))}
    style = {name: layers(1, 12, 20, 3 if name < "4" else 1)[0] for name in list(content)[::-2]}
    fusion = fuse(content, style)
    assert set(fusion.layers) == set(content)
    for name, score in zip(fusion.layers, fusion.content_score, strict=True):
        k = content[name].rank * (style[name].rank if name in style else 1)
        torch.testing.assert_close(score, naive([content[name]], [k])[0, 0], rtol=1e-6, atol=0)  # float32 products


def test_what_a_lora_remembers_belongs_to_its_layers() -> None:
    """Of layers some of which it knew, so that those that are alike have other sums to find, and others the same."""
    pairs = layers(3, 30, 20, 2, seed=1) + layers(3, 40, 20, 2, seed=2)
    lora = LoRA({str(index): pair for index, pair in enumerate(pairs)})
    fuse(LoRA({name: lora[name] for name in "034"}, scores=lora.scores), {})
    fuse(lora, {name: layers(1, 30, 20, 5)[0] for name in "0123"})
    for name, sums in lora.scores.items():
        assert {*sums} == {*(2 * rank for rank in RANKS), lora[name].numel, *([10] if name in "0123" else [])}
        found = torch.tensor([*sums.values()], dtype=torch.float64)
        torch.testing.assert_close(found, naive([lora[name]], list(sums))[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [1, 7, 20, 239, 240, 241, 1 << 20])
@pytest.mark.parametrize("batch", [1, 240, 479, 480, 720, 1679, 1680, 1 << 17])
def test_whole_numbers_are_exact_wherever_batches_and_blocks_end(
    monkeypatch: pytest.MonkeyPatch, block: int, batch: int
) -> None:
    bounds(monkeypatch, block, batch)
    pairs, ks = whole(7, 12, 20, 3), [100, 0, 1, 239, 240, 241, 10**9, 17]
    assert torch.equal(importance(pairs, ks), naive(pairs, ks))


@pytest.mark.parametrize("rank", [3, 24, 64])
@pytest.mark.parametrize(
    "size", [(8, 16), (10, 681), (991, 9), (30, 30), (200, 300), (640, 640), (1100, 1000)], ids=str
)
def test_a_layer_is_scored_as_if_alone_to_the_last_bit(size: tuple[int, int], rank: int) -> None:
    """MKL's batched products of few rows or columns are others than those of one layer; these must not be."""
    pairs, ks = layers(9, *size, rank), [1, rank, 8 * rank, size[0] * size[1]]
    alone = torch.cat([importance([pair], ks) for pair in pairs])
    assert torch.equal(importance(pairs, ks), alone)
    assert torch.equal(importance(pairs[::-1], ks), alone.flip(0))
    assert torch.equal(importance(pairs[3:5], ks), alone[3:5])


def test_layers_of_other_dtypes_are_scored_as_if_alone() -> None:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    drawn = zip(layers(3, 30, 20, 4), (half, brain, single), (single, half, brain), strict=True)
    pairs = [LowRank(pair.A.to(of_A), pair.B.to(of_B)) for pair, of_A, of_B in drawn]
    assert torch.equal(importance(pairs, [4, 600]), torch.cat([importance([pair], [4, 600]) for pair in pairs]))


# What it costs


def test_layers_that_are_alike_cost_a_gpu_the_launches_of_one(
    on_a_gpu: Callable[[Mapping[str, LowRank]], Dispatched],
) -> None:
    one, forty = (on_a_gpu(shapes_alone({(1280, 1280): count}, rank=8)) for count in (1, 40))
    assert forty.counts == one.counts and one.counts.total() < 50


def test_no_more_of_the_products_lies_on_a_gpu_than_a_block(
    on_a_gpu: Callable[[Mapping[str, LowRank]], Dispatched],
) -> None:
    """Of layers of which 40 and less than one fit."""
    counts = {(1280, 1280): 41, (30000, 3072): 2}
    products = [tuple(size) for size in on_a_gpu(shapes_alone(counts, rank=8)).products]
    rows = CUDA_BLOCK_ELEMENTS // 3072
    assert products == [(40, 1280, 1280), (1, 1280, 1280), *[(1, rows, 3072), (1, 30000 - rows, 3072)] * 2]


def test_factors_go_to_a_gpu_once_for_a_batch_and_block_nothing(
    on_a_gpu: Callable[[Mapping[str, LowRank]], Dispatched],
) -> None:
    found = on_a_gpu(shapes_alone({(1280, 1280): 41}, rank=8, device=torch.device("cpu")))
    assert found.moves == [True] * 4  # A and B of two batches


def test_all_of_sdxl_costs_a_gpu_few_hundred_launches(on_a_gpu: Callable[[Mapping[str, LowRank]], Dispatched]) -> None:
    """Of which a host makes some hundred thousand a second; a dispatch is a launch, a view of what is there, or two."""
    found = on_a_gpu(shapes_alone(SDXL, rank=8))
    assert sum(size[0] for size in found.products) == 560 and len(found.products) == 16
    assert found.counts.total() < 800


@pytest.mark.parametrize(("size", "together"), [((128, 128), 8), ((640, 640), 1)], ids=str)
def test_a_cpu_holds_small_layers_together_and_others_one_by_one(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], together: int
) -> None:
    stacked, held = subject._stacked, []
    monkeypatch.setattr(subject, "_stacked", lambda pairs, device: (held.append(len(pairs)), stacked(pairs, device))[1])
    importance(layers(9, *size, 2), [2])
    assert sum(held) == 9 and max(held) == together


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_scores_layers_together_without_being_waited_for() -> None:
    pairs, ks = layers(50, 700, 800, 8), [1, 64, 700 * 800]
    alone = torch.cat([importance([pair], ks, CUDA) for pair in pairs])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = importance(pairs, ks, CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)  # float32 products, by kernels that may be others
    torch.testing.assert_close(found.cpu(), importance(pairs, ks), rtol=1e-6, atol=0)
