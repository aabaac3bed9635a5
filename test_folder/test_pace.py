"""go_fast: what is left out, what is compiled, that neither waits nor stays, and that it is said."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

from klora import generate, layers
from klora.form.request import Request
from klora.layers import engines, takes_float8
from klora.lora import Acting, LoRA
from klora.models import load_model, pace
from klora.models.family import Compiled, Family
from klora.models.pace import compile_blocks, paced, warm_up
from test_folder import tiny

FAMILIES = {"sdxl": "sdxl", "flux": "flux-dev"}
COMPONENT = {"sdxl": "unet", "flux": "transformer"}


@pytest.fixture
def load(bases: Path) -> Callable[[str], Family]:
    return lambda family: load_model(family, bases / FAMILIES[family], torch.device("cpu"))


@pytest.fixture
def flux(load: Callable[[str], Family]) -> Family:
    return load("flux")


@pytest.fixture(autouse=True)
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of random numbers changes more between steps than one that has learnt to draw."""
    monkeypatch.setattr(pace, "THRESHOLD", 0.3)


def lora(model: Family, rank: int, folder: Path, seed: int = 0, layers: int | None = None) -> LoRA:
    """Of the last layers of a base, or all."""
    shapes = dict(list(tiny.linear_shapes(model.denoiser).items())[-(layers or 0) :])
    pairs = tiny.random_lora(shapes, rank, seed=seed)
    return model.read_lora(tiny.save_lora(folder / f"{rank}.safetensors", pairs, prefix=model.component))


def made(model: Family, facts: dict[str, Any] | None = None, **inputs: Any) -> np.ndarray:
    loras = {name: inputs.pop(name) for name in ("content", "style") if name in inputs}
    given = {"prompt": "a dog", "seed": 3, "num_inference_steps": 6, "width": 64, "height": 64} | inputs
    record = facts.__setitem__ if facts is not None else lambda name, value: None
    return np.stack([np.asarray(image) for image in generate(model, Request(**given), record=record, **loras)])


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


# The first-block cache


def test_steps_that_would_add_what_the_last_one_added_run_the_first_block_alone(
    flux: Family, passes: list[int]
) -> None:
    facts: dict[str, Any] = {}
    exact = made(flux, num_inference_steps=40)
    assert passes == [40, 40]
    passes[:] = [0, 0]
    fast = made(flux, facts, num_inference_steps=40, go_fast=True)
    assert passes[0] == 40 and 1 <= passes[1] < 35
    assert facts["go_fast"] == "first-block cache"
    assert np.abs(fast.astype(int) - exact).mean() < 16
    assert np.array_equal(fast, made(flux, num_inference_steps=40, go_fast=True))
    assert np.array_equal(exact, made(flux, num_inference_steps=40))


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


# Compiled blocks


@pytest.fixture
def ran() -> list[int]:
    """How often compiled code ran."""
    return [0]


@pytest.fixture
def backend(ran: list[int]) -> Callable[..., Any]:
    """torch.compile's front with no compiler behind it: graphs run as they were traced."""

    def build(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran[0] += 1
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_no_request_waits_for_a_compiler(
    load: Callable[[str], Family],
    family: str,
    tmp_path: Path,
    ran: list[int],
    backend: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After set-up, where memory was short, no LoRA, rank, engine, scale, schedule, prompt, size or batch makes a
    graph, and every block runs compiled code."""
    free, calls, facts = [0], [0], dict[str, Any]()
    monkeypatch.setattr(layers, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(pace, "THRESHOLD", -1.0)
    model = load(family)
    if family == "flux":  # one of each kind: torch takes long to trace them
        del model.denoiser.transformer_blocks[1:], model.denoiser.single_transformer_blocks[1:]
    ranks_and_layers = (((2, 4), None), ((8, 1), 7), ((30, 3), 2))
    pairs = [
        [lora(model, rank, tmp_path, seed, layers=count) for seed, rank in enumerate(ranks)]
        for ranks, count in ranks_and_layers
    ]
    compile_blocks(model, backend)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    blocks = sum(module._compiled_call_impl is not None for module in model.denoiser.modules())
    model.denoiser.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for content, style in pairs:
        for number, inputs in enumerate(
            (
                {"pattern": "s"},
                {"fusion": "sum", "content_scale": 0.5, "width": 128, "prompt": "a dog " * 60},
                {"fusion": "content", "num_outputs": 2, "height": 96},
                {"num_outputs": 3, "num_inference_steps": 3, "width": 96, "height": 160},
            )
        ):
            free[0], ran[0], calls[0] = (1 << 60) * (number % 2), 0, 0
            made(model, facts, content=content, style=style, go_fast=True, **{"num_inference_steps": 2} | inputs)
            assert facts["engine"] == ("gated", "merged")[number % 2]
            assert ran[0] == blocks * calls[0] > 0
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_blocks_run_for_those_who_ask_and_draw_the_same(
    load: Callable[[str], Family],
    tmp_path: Path,
    ran: list[int],
    backend: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For others the blocks run as they are, as for a gated LoRA that set-up, which had memory enough, did not foresee:
    nobody waits for a compiler."""
    facts: dict[str, Any] = {}
    sdxl = load("sdxl")
    pair = {"content": lora(sdxl, 4, tmp_path), "style": lora(sdxl, 2, tmp_path, seed=1)}
    exact = made(sdxl, **pair)
    assert not sdxl.compiled
    compile_blocks(sdxl, backend)
    ran[0], graphs = 0, counters["stats"]["unique_graphs"]
    assert np.array_equal(made(sdxl, **pair), exact)
    assert ran[0] == 0
    assert np.abs(made(sdxl, facts, go_fast=True, **pair).astype(int) - exact).max() <= 1
    assert ran[0] > 0 and facts["go_fast"] == "compiled blocks" and facts["engine"] == "merged"
    monkeypatch.setattr(layers, "free_bytes", lambda device: 0)
    assert np.abs(made(sdxl, facts, go_fast=True, **pair).astype(int) - exact).max() <= 1
    assert facts["engine"] == "gated"
    assert counters["stats"]["unique_graphs"] == graphs


def test_products_in_float8_are_compiled_for_every_pair_and_for_those_who_ask(
    flux: Family, tmp_path: Path, ran: list[int], backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens: what modulates norms keeps its dtype. Where memory is short, the gated engine has the own dtype."""
    monkeypatch.setattr(pace, "THRESHOLD", -1.0)
    del flux.denoiser.transformer_blocks[1:], flux.denoiser.single_transformer_blocks[1:]
    facts: dict[str, Any] = {}
    pairs = [
        {"content": lora(flux, rank, tmp_path, layers=count), "style": lora(flux, 1, tmp_path, seed=1, layers=count)}
        for rank, count in ((2, None), (40, 5))
    ]
    exact = [made(flux, num_inference_steps=2, **pair) for pair in (*pairs, {})]
    compile_blocks(flux, backend, float8=True)
    linears = [name for name, part in flux.denoiser.named_modules() if type(part) is nn.Linear and "blocks" in name]
    assert flux.compiled == Compiled((), tuple(name for name in linears if "norm" not in name))
    graphs = counters["stats"]["unique_graphs"]
    for pair, expected in zip((*pairs, {}), exact, strict=True):
        assert np.array_equal(made(flux, facts, num_inference_steps=2, **pair), expected)
        ran[0] = 0
        fast = made(flux, facts, num_inference_steps=2, go_fast=True, **pair)
        assert ran[0] == 2 * 2 and facts["engine"] == "merged"
        assert facts["go_fast"] == "compiled blocks, first-block cache, float8 products"
        assert 0 < np.abs(fast.astype(int) - expected).mean() < 3
        made(flux, num_inference_steps=2, go_fast=True, num_outputs=3, width=128, **pair)
    assert counters["stats"]["unique_graphs"] == graphs
    monkeypatch.setattr(layers, "free_bytes", lambda device: 0)
    made(flux, facts, num_inference_steps=2, go_fast=True, **pairs[0])
    assert (facts["engine"], facts["go_fast"]) == ("gated", "first-block cache")
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_warming_up_writes_a_weight_of_each_kind_by_two_loras_by_one_and_by_none_and_leaves_no_trace(
    load: Callable[[str], Family], family: str, float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, merges, written = load(family), engines._merges, set[tuple[bool, int]]()
    names = [name for name, part in model.denoiser.named_modules() if type(part) is nn.Linear and takes_float8(part)]
    model.compiled = Compiled((), tuple(names[-2:])) if float8 else None

    def watched(weights: Any, outs: Any, scales: Any) -> Callable[[Iterable[tuple[int, Acting]]], None]:
        def write(layers: Iterable[tuple[int, Acting]]) -> None:
            changes = list(layers)
            written.update((index in scales, len(acting)) for index, acting in changes)
            merges(weights, outs, scales)(changes)

        return write

    monkeypatch.setattr(engines, "_merges", watched)
    before = dict(model.denoiser.named_parameters())
    warm_up(model)
    assert written == {(kind, loras) for kind in {False, float8} for loras in (0, 1, 2)}
    assert all(parameter is before[name] for name, parameter in model.denoiser.named_parameters())


def test_the_stance_towards_compiling_is_given_back(load: Callable[[str], Family], backend: Callable[..., Any]) -> None:
    sdxl = load("sdxl")
    compile_blocks(sdxl, backend)
    graphs = counters["stats"]["unique_graphs"]
    with pytest.raises(KeyboardInterrupt), paced(sdxl, Request("a dog", go_fast=False)):
        raise KeyboardInterrupt
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert counters["stats"]["unique_graphs"] == graphs + 1
