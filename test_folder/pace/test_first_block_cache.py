"""What the first-block cache leaves out for go_fast, that nothing of it stays, and that it is said."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from klora import layers
from klora.models import pace
from klora.models.family import Family
from test_folder.pace.drawing import lora, made


@pytest.fixture
def passes(flux: Family) -> Iterator[list[int]]:
    """How often the first and the last block of FLUX.1 ran."""
    counts, blocks = (
        [0, 0],
        [flux.denoiser.transformer_blocks[0].attn, flux.denoiser.single_transformer_blocks[-1].attn],
    )
    for place, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, at=place: counts.__setitem__(at, counts[at] + 1))
    yield counts


def test_steps_that_would_add_what_the_last_one_added_run_the_first_block_alone(
    flux: Family, passes: list[int]
) -> None:
    facts: dict[str, Any] = {}
    exact = made(flux, num_inference_steps=20)
    assert passes == [20, 20]
    passes[:] = [0, 0]
    fast = made(flux, facts, num_inference_steps=20, go_fast=True)
    assert passes[0] == 20 and 1 <= passes[1] < 20
    assert facts["go_fast"] == "first-block cache"
    assert np.abs(fast.astype(int) - exact).mean() < 16
    assert np.array_equal(fast, made(flux, num_inference_steps=20, go_fast=True))
    assert np.array_equal(exact, made(flux, num_inference_steps=20))


def test_every_step_in_which_a_layer_changes_hands_is_in_full(
    flux: Family, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first block always says that nothing changes, those steps and the first run all blocks, no others."""
    monkeypatch.setattr(pace, "THRESHOLD", 1e9)
    pair = {"content": lora(flux, 4, tmp_path, layers=4), "style": lora(flux, 2, tmp_path, seed=1, layers=4)}
    flipped: list[bool] = []
    ran: list[int] = []
    original = layers.Gate.set_step

    def set_step(gate: layers.Gate, step: int) -> layers.Gate:
        before = gate.flips
        ran.append(passes[1])
        result = original(gate, step)
        flipped.append(gate.flips != before)
        return result

    monkeypatch.setattr(layers.Gate, "set_step", set_step)
    made(flux, num_inference_steps=20, go_fast=True, pattern="s", **pair)
    whole = [after > before for before, after in pairwise(ran[1:])]  # ran[0]: attached()'s own call
    assert any(flipped[1:]) and whole == [True, *flipped[2:-1]]  # flipped: attached()'s, step 0's, ..., and the end's


@pytest.mark.parametrize("calls", [0, 1, 5, 40])
def test_an_interruption_leaves_no_hook(flux: Family, calls: int) -> None:
    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt

    exact = made(flux)  # diffusers keeps a registry of its own from the first call on
    before = photograph(flux.denoiser)
    handle = flux.denoiser.single_transformer_blocks[0].register_forward_hook(interrupt)
    with suppress(KeyboardInterrupt):
        made(flux, go_fast=True, num_inference_steps=60)
    handle.remove()
    assert photograph(flux.denoiser) == before
    assert np.array_equal(made(flux), exact)


def photograph(denoiser: nn.Module) -> list[Any]:
    return [(name, module.__dict__.get("forward"), module.__dict__.get("_diffusers_hook"), module.__dict__.keys())
            for name, module in denoiser.named_modules()]  # fmt: skip


def test_where_nothing_helps_the_images_are_the_exact_ones_and_it_is_said(load: Callable[[str], Family]) -> None:
    facts: dict[str, Any] = {}
    sdxl = load("sdxl")
    assert np.array_equal(made(sdxl, facts, go_fast=True), made(sdxl))
    assert facts["go_fast"] == "nothing makes this faster on SDXL"


def test_an_image_to_start_from_is_redrawn_in_full(flux: Family, passes: list[int]) -> None:
    facts: dict[str, Any] = {}
    image = Image.new("RGB", (64, 64), "red")
    fast = made(flux, facts, go_fast=True, image=image)
    assert passes[0] == passes[1] > 0
    assert facts["go_fast"] == "nothing makes this faster on FLUX.1"
    assert np.array_equal(fast, made(flux, image=image))


def test_a_request_that_does_not_ask_is_not_told(flux: Family) -> None:
    facts: dict[str, Any] = {}
    made(flux, facts)
    assert "go_fast" not in facts
