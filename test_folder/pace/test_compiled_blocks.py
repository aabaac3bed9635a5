"""What is compiled for go_fast, that no request waits for it, and that it stays with those who ask."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from klora import layers
from klora.form.request import Request
from klora.layers import engines, takes_float8
from klora.lora import GatedPairs
from klora.models import compiling, pace
from klora.models.compiling import compile_blocks, warm_up
from klora.models.family import Compiled, Family
from klora.models.pace import paced
from test_folder.pace.drawing import lora, made
from test_folder.tiny import BASES


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


ROLES = ("content", "style")
VARIED: tuple[dict[str, Any], ...] = (
    {"pattern": "s"},
    {"fusion": "sum", "content_scale": 0.5, "width": 128, "prompt": "a dog " * 60},
    {"fusion": "content", "num_outputs": 2, "height": 96},
    {"num_outputs": 3, "num_inference_steps": 3, "width": 96, "height": 160},
)


@pytest.mark.parametrize("family", BASES)
def test_who_asks_runs_compiled_code_nobody_else_does_and_no_request_waits_for_a_compiler(
    load: Callable[[str], Family],
    family: str,
    tmp_path: Path,
    ran: list[int],
    backend: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After set-up no LoRA, rank, engine, scale, schedule, prompt, size or batch makes a graph, and every block runs
    compiled code. SDXL's memory was short then, and its image stays the same; FLUX.1 foresaw both engines, and
    multiplies in float8."""
    free, calls, facts = [1 << 60], [0], dict[str, Any]()
    monkeypatch.setattr(layers, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(pace, "THRESHOLD", -1.0)
    model, float8 = load(family), family == "flux"
    if float8:  # one block of each kind: torch takes long to trace them
        del model.denoiser.transformer_blocks[1:], model.denoiser.single_transformer_blocks[1:]
    ranks_and_layers = (((2, 4), None), ((40, 1), 7), ((30, 3), 2), ((), 0))
    pairs = [
        {
            role: lora(model, rank, tmp_path, seed, count)
            for seed, (role, rank) in enumerate(zip(ROLES, ranks, strict=False))
        }
        for ranks, count in ranks_and_layers
    ]
    exact = [made(model, num_inference_steps=2, **pair) for pair in pairs]
    assert not model.compiled
    free[0] = 0
    compile_blocks(model, backend, **({"engines": ("gated", "merged"), "float8": True} if float8 else {}))
    all_linears = [name for name, part in model.denoiser.named_modules() if type(part) is nn.Linear]
    linears = [name for name in all_linears if "transformer_blocks" in name]
    tokens = tuple(name for name in linears if "norm" not in name)  # what modulates norms keeps its dtype
    assert model.compiled == Compiled(tuple(linears), tokens if float8 else ())
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    blocks = sum(module._compiled_call_impl is not None for module in model.denoiser.modules())
    model.denoiser.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    means = "compiled blocks, first-block cache, float8 products" if float8 else "compiled blocks"
    for pair, expected in zip(pairs, exact, strict=True):
        free[0], ran[0] = 1 << 60, 0
        assert np.array_equal(made(model, num_inference_steps=2, **pair), expected)
        assert ran[0] == 0
        difference = np.abs(made(model, facts, num_inference_steps=2, go_fast=True, **pair).astype(int) - expected)
        assert 0 < difference.mean() < 3 if float8 else difference.max() <= 1
        assert facts["go_fast"] == means
        made(model, num_inference_steps=2, go_fast=True, num_outputs=3, width=128, **pair)
        for number, inputs in enumerate(VARIED if pair else ()):
            free[0], ran[0], calls[0] = (1 << 60) * (number % 2), 0, 0
            made(model, facts, go_fast=True, **{"num_inference_steps": 2} | inputs, **pair)
            assert facts["engine"] == ("gated", "merged")[number % 2]
            assert ran[0] == blocks * calls[0] > 0
    # As set-up leaves a base that had memory enough, and so foresaw no gated LoRA.
    free[0], ran[0], model.compiled = 0, 0, model.compiled._replace(alike=())
    means = "first-block cache" if float8 else "nothing makes this faster on SDXL"
    difference = np.abs(made(model, facts, num_inference_steps=2, go_fast=True, **pairs[0]).astype(int) - exact[0])
    assert ran[0] == 0 and difference.max() <= 1
    assert (facts["engine"], facts["go_fast"]) == ("gated", means)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("free", [0, 1 << 60])
def test_nothing_is_lent_as_was_not_compiled(
    load: Callable[[str], Family], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What set-up had memory to try: the gated engine's linears, or the merged one's in float8, and never both."""
    sdxl = load("sdxl")
    name = next(name for name in sdxl.inventory["unet"] if name.endswith("to_q"))
    monkeypatch.setattr(sdxl.denoiser, "compile_repeated_blocks", lambda **_: None)
    monkeypatch.setattr(compiling, "_compiled_linears", lambda denoiser: [name])
    monkeypatch.setattr(layers, "free_bytes", lambda device: free)
    compile_blocks(sdxl, float8=True)
    assert sdxl.compiled == (Compiled((), (name,)) if free else Compiled((name,), ()))


def test_what_a_gpu_cannot_multiply_in_float8_and_what_modulates_norms_keep_their_dtype() -> None:
    block = {"to_q": nn.Linear(16, 32), "odd": nn.Linear(16, 24), "norm1": nn.ModuleDict({"linear": nn.Linear(16, 16)})}
    denoiser = nn.ModuleDict({"block": nn.ModuleDict(block)})
    names = ["block.to_q", "block.odd", "block.norm1.linear"]
    assert compiling._for_float8(denoiser, names) == ("block.to_q",)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("family", BASES)
def test_warming_up_writes_a_weight_of_each_kind_by_two_loras_by_one_and_by_none_and_leaves_no_trace(
    load: Callable[[str], Family], family: str, float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, merges, written = load(family), engines._merges, set[tuple[bool, int]]()
    names = [name for name, part in model.denoiser.named_modules() if type(part) is nn.Linear and takes_float8(part)]
    model.compiled = Compiled((), tuple(names[-2:])) if float8 else None

    def watched(weights: Any, outs: Any, scales: Any) -> Callable[[Iterable[tuple[int, GatedPairs]]], None]:
        def write(layers: Iterable[tuple[int, GatedPairs]]) -> None:
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
    sdxl.compiled = Compiled()
    graphs = counters["stats"]["unique_graphs"]
    with pytest.raises(KeyboardInterrupt), paced(sdxl, Request("a dog", go_fast=False)):
        raise KeyboardInterrupt
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert counters["stats"]["unique_graphs"] == graphs + 1
