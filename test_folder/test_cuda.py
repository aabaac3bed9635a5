"""What only a CUDA GPU shows: the host never waits for it while a plan is followed, engines agree there, and a seed
means the same image. Skipped where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from klora import Request, fuse, generate, load_model
from klora.device import has_float8
from klora.fusion import Schedule
from klora.layers import Engine, attached
from klora.lora import LoRA, LowRank, Plan
from klora.models.family import Family
from test_folder.tiny import BASES

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

STEPS, CUDA = 6, torch.device("cuda")
REQUEST = Request("a photo of a sks dog", seed=3, num_inference_steps=STEPS, disable_safety_checker=True)


@pytest.fixture(scope="module", params=BASES)
def model(request: pytest.FixtureRequest, bases: Path) -> Family:
    """Tiny, on the GPU, in float32, so that engines can be compared."""
    return load_model(request.param, bases / BASES[request.param], CUDA, torch.float32)


def pair_for(model: Family, loras: Path) -> dict[str, LoRA]:
    """The content and the style LoRA of a base, read now."""
    family = {"SDXL": "sdxl", "FLUX.1": "flux"}[model.name]
    return {role: model.read_lora(loras / f"{family}_{role}.safetensors") for role in ("content", "style")}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let torch raise where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ["merged", "gated"])
def test_a_plan_is_followed_without_waiting_for_the_gpu(model: Family, loras: Path, engine: Engine) -> None:
    fusion = fuse(**pair_for(model, loras), device=CUDA)
    with attached(model.denoiser, fusion, Schedule.from_pattern("s"), steps=STEPS, engine=engine) as gate:
        with no_waiting():
            for step in range(STEPS):
                gate.set_step(step)
        assert gate.flips > 0


def test_a_seed_means_the_same_image_and_both_engines_draw_it(
    model: Family, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_for(model, loras)
    engines: list[str] = []
    facts: dict[str, Any] = {}

    def drawn(request: Request) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = model.pipe.vae.decoder.register_forward_hook(lambda module, args, output: seen.append(output.cpu()))
        try:
            generate(model, request, **pair, record=lambda name, value: facts.update({name: value}))
            engines.append(facts["engine"])
        finally:
            hook.remove()
        return seen[0]

    merged = drawn(REQUEST)
    assert facts["peak_bytes"] > sum(weight.nbytes for weight in model.denoiser.parameters())
    assert torch.equal(drawn(REQUEST), merged)
    assert not torch.equal(drawn(replace(REQUEST, seed=4)), merged)
    monkeypatch.setattr("klora.layers.HEADROOM_BYTES", 1 << 60)  # and no CUDA graph either
    torch.testing.assert_close(drawn(REQUEST), merged, rtol=0, atol=2e-2)  # tf32 is off, but sums have another order
    assert engines == ["merged"] * 3 + ["gated"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flux_draws_the_very_image_in_fewer_kernels(
    bases: Path, loras: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    kernels = pytest.importorskip("klora.kernels")
    flux = load_model("flux", bases / "flux-dev", CUDA, dtype)
    pair, calls, rotated = pair_for(flux, loras), [], kernels.rotated
    monkeypatch.setattr(kernels, "rotated", lambda *args: (calls.append(1), rotated(*args))[1])

    def drawn() -> list[bytes]:
        return [image.tobytes() for image in generate(flux, replace(REQUEST, num_outputs=2), **pair)]

    fewer, blocks = drawn(), [*flux.denoiser.transformer_blocks, *flux.denoiser.single_transformer_blocks]
    assert len(calls) == 2 * len(blocks) * STEPS
    assert {type(block.attn.processor) for block in blocks} == {FluxAttnProcessor}
    monkeypatch.setattr("klora.models.pace.has_triton", lambda device: False)
    assert drawn() == fewer
    assert len(calls) == 2 * len(blocks) * STEPS


@pytest.mark.parametrize("inputs", [{}, {"num_outputs": 2}, {"scheduler": "PNDM", "guidance_scale": 1.0}], ids=str)
def test_a_recorded_denoiser_draws_the_very_image(
    model: Family, loras: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any]
) -> None:
    """With LoRAs that change places on the way; a scheduler that remembers what it was given is given copies."""
    if inputs.get("scheduler") and not model.schedulers:
        pytest.skip("FLUX.1 has its own")
    pair = pair_for(model, loras)
    request = replace(REQUEST, width=128, height=96, **inputs)
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])

    def drawn(recorded: bool) -> list[bytes]:
        monkeypatch.setattr(type(model), "host_bound", recorded)
        return [image.tobytes() for image in generate(model, request, **pair)]

    exact = drawn(False)
    assert not replays
    assert drawn(True) == exact
    replayed = len(replays)
    assert replayed >= STEPS - 1  # PNDM takes one step twice
    assert drawn(False) == exact and len(replays) == replayed


@pytest.mark.skipif(not has_float8(CUDA), reason="the GPU does not multiply in float8")
@pytest.mark.parametrize("rows", [1, 7, 512])
def test_products_in_float8_are_those_of_the_merged_weight(rows: int) -> None:
    """Also compiled, for any number of rows; and no flip waits for the GPU."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 96, bias=False)).to(CUDA)
    model.to(torch.bfloat16)
    lora = {
        str(index): LowRank(torch.randn(4, part.in_features) / 16, torch.randn(part.out_features, 4) / 16)
        for index, part in enumerate(model)
    }
    x = torch.randn(rows, 256, device=CUDA, dtype=torch.bfloat16)
    plan = Plan(("0", "1"), (lora,), torch.tensor([[[1.0], [0.0]], [[-0.5], [2.0]]]))
    compiled = torch.compile(model, dynamic=True)
    for step in range(2):
        with torch.no_grad():
            with attached(model, plan, engine="merged") as gate:
                gate.set_step(step)
                expected = model(x)
            with attached(model, plan, engine="merged", float8=["0", "1"]) as gate:
                with no_waiting():
                    gate.set_step(step)
                outputs = model(x), compiled(x)
        for output in outputs:
            assert (output - expected).norm() < 0.08 * expected.norm()
