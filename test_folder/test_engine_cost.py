"""What K-LoRA costs, counted and not timed: products, flips, waits for the device, addresses."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from klora.fusion import Fusion, Schedule, fuse
from klora.layers import Engine, LoRALinear, attached
from klora.lora import LowRank
from test_folder import tiny

STEPS, TOKENS = 12, 7
SHAPES = {"to_q": (24, 16), "ff.0": (48, 24), "ff.2": (16, 48)}
CONTENT_RANK, STYLE_RANK = 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 24)
        self.ff = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(self.to_q(x))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fusion() -> Fusion:
    """Of two LoRAs that change hands in several steps."""
    pairs = (tiny.random_lora(SHAPES, rank, seed=rank) for rank in (CONTENT_RANK, STYLE_RANK))
    content, style = ({name: LowRank(*pair) for name, pair in layers.items()} for layers in pairs)
    return fuse(content, style)


SCHEDULE = Schedule.from_pattern("s*")


def products(fusion: Fusion | None, engine: Engine = "merged") -> tuple[int, list[int]]:
    """Floating-point operations of matrix products: of lending, and of each step with its flips."""
    block, x = Block(), torch.randn(TOKENS, 16)
    totals = []
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        with attached(block, fusion, SCHEDULE, steps=STEPS, engine=engine) if fusion else nullcontext() as gate:
            for step in range(STEPS):
                totals.append(counter.get_total_flops())
                if gate:
                    gate.set_step(step)
                block(x)
        totals.append(counter.get_total_flops())
    return totals[0], [after - before for before, after in pairwise(totals)]


def addmm_flops(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    """Of the product that is added to where the total lies, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def flips(fusion: Fusion) -> Tensor:
    """Layers that change hands as each step begins, bool [STEPS, layers]; by the closed form."""
    wins = fusion.content_wins(SCHEDULE, STEPS)
    return torch.cat([torch.zeros_like(wins[:1]), wins[1:] != wins[:-1]])


def test_a_merged_step_multiplies_what_a_bare_one_does_and_a_flip_one_thin_product(fusion: Fusion) -> None:
    _, bare = products(None)
    _, merged = products(fusion)
    wins, changed = fusion.content_wins(SCHEDULE, STEPS), flips(fusion)
    assert changed.any() and not changed.any(dim=1).all()
    for step in range(STEPS):
        of_flips = sum(
            2 * (CONTENT_RANK if wins[step, layer] else STYLE_RANK) * SHAPES[name][0] * SHAPES[name][1]
            for layer, name in enumerate(fusion.layers)
            if changed[step, layer]
        )
        assert merged[step] == bare[step] + of_flips


def test_a_gated_step_adds_both_low_rank_paths_and_nothing_else(fusion: Fusion) -> None:
    _, bare = products(None)
    _, gated = products(fusion, "gated")
    path = sum(2 * TOKENS * (CONTENT_RANK + STYLE_RANK) * (rows + columns) for rows, columns in SHAPES.values())
    assert gated == [step + path for step in bare]


def test_lending_makes_each_layer_once(fusion: Fusion) -> None:
    lending, _ = products(fusion)
    first = fusion.content_wins(SCHEDULE, STEPS)[0]
    ranks = [CONTENT_RANK if wins else STYLE_RANK for wins in first]
    assert lending == sum(2 * r * rows * columns for r, (rows, columns) in zip(ranks, SHAPES.values(), strict=True))
    assert products(fusion, "gated")[0] == 0


@pytest.mark.parametrize("engine", ["merged", "gated"])
def test_the_host_never_asks_the_device_for_a_number(fusion: Fusion, engine: Engine) -> None:
    """A tensor on the meta device has no number to give: whoever asked would be told so."""
    block, x = Block().to("meta"), torch.empty(TOKENS, 16, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        block(x).sum().item()
    with attached(block, fusion, SCHEDULE, steps=STEPS, engine=engine) as gate:
        for step in range(STEPS):
            gate.set_step(step)
            block(x)
        assert gate.flips == int(flips(fusion).sum())


@pytest.mark.parametrize("engine", ["merged", "gated"])
def test_what_a_captured_graph_reads_stays_where_it_is(fusion: Fusion, engine: Engine) -> None:
    block = Block()
    with attached(block, fusion, SCHEDULE, steps=STEPS, engine=engine) as gate:
        places = addresses(block)
        for step in range(STEPS):
            gate.set_step(step)
            assert addresses(block) == places


def addresses(block: nn.Module) -> dict[str, int]:
    """Of every parameter, and of every factor that is lent, which is none."""
    factors = {
        f"{name}.{factor}": getattr(module, factor)
        for name, module in block.named_modules()
        for factor in ("lora_A", "lora_B")
        if isinstance(module, LoRALinear)
    }
    return {name: tensor.data_ptr() for name, tensor in [*block.named_parameters(), *factors.items()]}
