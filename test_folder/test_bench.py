"""The bench's ways draw what they claim to: the naive one as ours do, ours as PEFT does. Nothing is left behind; what
--full builds has the published sizes. No figure is held to a bound."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from in_venv import program
from torch import Tensor

from examples import subjects
from examples.yardsticks import PHASES, WAYS, Subject, Way, drawn, klora, recomputing
from klora.errors import BaseModelError, LoRAError
from klora.fusion import Schedule, fuse
from test_folder import published, tiny

BARE = next(iter(WAYS))
STEPS = 4
COMPONENTS = {"SDXL": "unet", "FLUX.1-dev": "transformer"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return program("bench")


@pytest.fixture(scope="module", params=["sdxl", "flux-dev"])
def subject(script: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """One for all tests, so that they notice what a way leaves behind."""
    found: Subject = subjects.tiny_subject(request.param, tmp_path_factory.mktemp("bench"), STEPS)
    return found


@pytest.fixture
def brief(subject: Subject) -> Subject:
    """The same with one step, for what does not depend on their number."""
    return replace(subject, request=replace(subject.request, num_inference_steps=1))


class Drawn(NamedTuple):
    """pixels: what the VAE decodes, float [1, 3, H, W], about in [-1, 1]; an image has but 256 levels."""

    pixels: Tensor
    images: list[Any]
    figures: dict[str, float]


def draw(way: Way, subject: Subject) -> Drawn:
    decoded: list[Tensor] = []
    decoder = subject.model.pipe.vae.decoder
    hook = decoder.register_forward_hook(lambda module, args, output: decoded.append(output))
    try:
        images, figures = drawn(way, subject)
    finally:
        hook.remove()
    return Drawn(*decoded, images, figures)


@pytest.fixture(scope="module")
def runs(subject: Subject) -> dict[str, Drawn]:
    """Each way's, of one round."""
    return {name: draw(way, subject) for name, way in WAYS.items()}


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # float32, sums in another order; 4e-6 was seen


# What the ways draw


@pytest.mark.parametrize(
    ("pattern", "alpha", "beta"),
    [("s", None, None), ("s*", None, None), ("s", 4.0, 0.0)],
    ids=["s", "s*", "s from 0 to 4, which the very last call begins anew"],
)
def test_the_naive_way_draws_what_klora_does_with_a_clock_that_counts_layer_calls(
    subject: Subject, pattern: str, alpha: float | None, beta: float | None
) -> None:
    subject = replace(subject, request=replace(subject.request, pattern=pattern, alpha=alpha, beta=beta))
    fusion = fuse(*subject.read("content", "style"))
    wins = fusion.content_wins(subject.schedule, STEPS, clock="reference")
    assert 0.1 < wins.double().mean() < 0.9
    ours: Way = partial(klora, engine="merged", clock="reference")
    assert_same(draw(ours, subject).pixels, draw(WAYS["K-LoRA, naive"], subject).pixels)


def test_both_engines_draw_the_same(runs: dict[str, Drawn]) -> None:
    assert_same(runs["K-LoRA, merged"].pixels, runs["K-LoRA, gated"].pixels)


@pytest.mark.parametrize("what", ["one LoRA", "sum"])
def test_ours_draws_what_peft_does(runs: dict[str, Drawn], what: str) -> None:
    assert_same(runs[what].pixels, runs[f"{what}, PEFT"].pixels)


def test_bare_base_one_lora_sum_and_k_lora_draw_different_images(runs: dict[str, Drawn]) -> None:
    images = [runs[way].pixels for way in (BARE, "one LoRA", "sum", "K-LoRA, merged", "K-LoRA, naive")]
    for index, image in enumerate(images):
        assert all((image - other).abs().max() > 1e-3 for other in images[:index])


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_a_way_leaves_every_module_and_the_next_image_as_they_were(brief: Subject, way: str) -> None:
    denoiser = brief.model.denoiser

    def photograph() -> list[Any]:
        modules = [(name, id(part), len(part._forward_hooks)) for name, part in denoiser.named_modules()]
        return [modules, [(name, id(weight)) for name, weight in denoiser.named_parameters()]]

    before, undisturbed = photograph(), draw(WAYS[BARE], brief)
    drawn(WAYS[way], brief)
    assert photograph() == before
    assert torch.equal(draw(WAYS[BARE], brief).pixels, undisturbed.pixels)


def test_naive_refuses_a_layer_that_one_lora_has_alone(subject: Subject) -> None:
    content, style = subject.read("content", "style")
    fewer = dict(list(style.items())[1:])
    with (
        pytest.raises(LoRAError, match="one LoRA only"),
        recomputing(subject.model.denoiser, content, fewer, Schedule.from_pattern("s"), STEPS),
    ):
        pass


# What is measured


@pytest.mark.parametrize("way", WAYS)
def test_every_way_yields_finite_figures(runs: dict[str, Drawn], way: str) -> None:
    [image], figures = runs[way].images, runs[way].figures
    expected = {"step_seconds", "image_seconds"}
    if not way.startswith(BARE):
        expected |= {"load_seconds", *(["cold_pair_seconds"] if way == "K-LoRA, naive" else PHASES)}
    assert image.size == (64, 64)
    assert figures.keys() == expected
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert STEPS * figures["step_seconds"] < figures["image_seconds"]  # which has the decoding, too


def test_a_pair_is_cold_when_it_is_read(subject: Subject) -> None:
    fuse(*subject.read("content", "style"))
    assert not any(lora.scores for lora in subject.read("content", "style"))


def test_rounds_take_the_ways_in_turn_and_the_warm_up_is_not_counted(script: ModuleType, brief: Subject) -> None:
    turns = []

    def way(name: str) -> Way:
        @contextmanager
        def noted(subject: Subject, lap: Any) -> Iterator[Any]:
            turns.append(name)
            yield lambda step: None

        return noted

    found = script.measured(brief, {"a": way("a"), "b": way("b")}, rounds=2, warm_up=1)
    assert turns == ["a", "b"] * 3
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("chosen", [None, ["sum", "K-LoRA, merged"]])
def test_report_of_a_base_is_json_and_its_table_has_a_row_for_each_way(
    script: ModuleType, chosen: list[str] | None
) -> None:
    """Of those asked for, and the bare base, with which they are compared."""
    options = SimpleNamespace(steps=1, rounds=1, warm_up=0, threads=1, full=False, ways=chosen, compile=None)
    report = script.machine(options) | {"bases": {"tiny-flux-dev": script.report_of("tiny-flux-dev", options)}}
    lines = script.table(json.loads(json.dumps(report))).splitlines()
    assert {"torch", "diffusers", "peft"} == report["versions"].keys()
    assert "tiny-flux-dev: 64x64, 1 steps, float32, LoRAs of rank 8 and 16 on 40 layers." in lines
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")] == [
        "way", *([BARE, *chosen] if chosen else WAYS)
    ]  # fmt: skip


def test_the_table_shows_medians_with_their_spread_and_ratios_of_each_round(script: ModuleType) -> None:
    figures = [(2.0, 0.2), (4.0, 0.4), (3.0, 0.1)]
    bare = [{"image_seconds": image, "step_seconds": step} for image, step in figures]
    slow = [{"image_seconds": 3 * i, "step_seconds": s, "load_seconds": 1.2345, "peak_bytes": 2e9} for i, s in figures]
    base = {"pixels": (64, 64), "steps": 4, "dtype": "float32", "layers": 2, "ranks": [4, 8]}
    base |= {"ways": {"bare base": bare, "slow": slow}}
    machine = {"device": "a CPU", "threads": 1, "rounds": 3, "versions": {"torch": "2"}}
    lines = script.table(machine | {"bases": {"b": base}}).splitlines()
    assert lines[0] == "a CPU; torch threads 1; torch 2; median of 3 rounds."
    assert "| bare base | 3 (2..4) | 200 (100..400) |  |  |  |  |  | 1.00 | 1.00 |" in lines
    assert "| slow | 9 (6..12) | 200 (100..400) | 1230 (1230..1230) |  |  |  | 2 (2..2) | 3.00 | 1.00 |" in lines
    drifting = [{"image_seconds": 10 * figure["image_seconds"] * n, "step_seconds": 1} for n, figure in enumerate(bare)]
    assert script.ratio(drifting, bare, "image_seconds") == 10  # of 0, 10 and 20: the medians' own ratio is 20 / 1.5


def test_a_base_that_is_not_there_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--bases", "SDXL"], ["--full", "--bases", "tiny-sdxl"]):
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        with pytest.raises(SystemExit):
            script.parsed()
        assert f"{arguments[-1]}. Expected some of" in capsys.readouterr().err


# The published sizes


@pytest.mark.parametrize(
    ("base", "billions", "layers", "latents"),
    [("SDXL", 2.567, 722, (2, 4, 128, 128)), ("FLUX.1-dev", 11.901, 494, (1, 4096, 64))],
)
@torch.no_grad()
def test_full_has_the_published_sizes_and_its_prompt_fits_the_denoiser(
    script: ModuleType, base: str, billions: float, layers: int, latents: tuple[int, ...]
) -> None:
    parts = {name: build for name, (_, build) in published.modules(COMPONENTS[base]).items()}
    meta = torch.device("meta")
    model = subjects.assembled(COMPONENTS[base], parts[COMPONENTS[base]], parts["vae"], meta, torch.bfloat16)
    assert subjects.FULL == COMPONENTS
    assert model.denoiser.num_parameters() / 1e9 == pytest.approx(billions, abs=5e-4)
    assert len(subjects.adapted(model.denoiser)) == layers
    assert model.native_size == 1024
    assert {weight.dtype for weight in model.denoiser.parameters()} == {torch.bfloat16}
    assert model.pipe.vae.dtype == {"SDXL": torch.float32, "FLUX.1-dev": torch.bfloat16}[base]

    prompt = subjects.random_conditioning(model)
    call = tiny.unet_inputs if base == "SDXL" else tiny.flux_inputs
    inputs = {name: part for name, part in call(model.denoiser, device="meta").items() if part is not None}
    noisy = torch.empty(latents, device=meta, dtype=torch.bfloat16)
    if base == "SDXL":
        both = {name: torch.cat([prompt[f"negative_{name}"], prompt[name]]) for name in tuple(prompt)[:2]}
        times = torch.empty(2, 6, device=meta)
        added = {"text_embeds": both["pooled_prompt_embeds"], "time_ids": times}
        inputs |= {"encoder_hidden_states": both["prompt_embeds"], "added_cond_kwargs": added, "sample": noisy}
        inputs["timestep"] = torch.empty((), device=meta)
    else:
        inputs |= {"encoder_hidden_states": prompt["prompt_embeds"], "hidden_states": noisy}
        inputs |= {"pooled_projections": prompt["pooled_prompt_embeds"]}
        inputs |= {"img_ids": torch.empty(4096, 3, device=meta), "txt_ids": torch.empty(512, 3, device=meta)}
    assert model.denoiser(**inputs).sample.shape == latents


@pytest.mark.parametrize(("base", "component"), [("sdxl", "unet"), ("flux-dev", "transformer")])
def test_every_way_runs_on_what_full_assembles(
    script: ModuleType, bases: Path, tmp_path: Path, base: str, component: str
) -> None:
    """Of the tiny sizes, on the CPU, in the dtypes of --full: bfloat16, without text encoders, from random prompts."""
    small: Any = diffusers.DiffusionPipeline.from_pretrained(bases / base)

    def like(part: Any) -> Any:
        return lambda: type(part).from_config(part.config)

    cpu = torch.device("cpu")
    model = subjects.assembled(component, like(getattr(small, component)), like(small.vae), cpu, torch.bfloat16)
    subject = subjects.random_subject(model, subjects.random_conditioning(model), tmp_path, 1, std=0.01)
    assert {pair.A.dtype for pair in subject.read("style")[0].values()} == {torch.bfloat16}
    for way in WAYS.values():
        [image], figures = drawn(way, subject)
        assert image.size == (64, 64)
        assert all(math.isfinite(value) for value in figures.values())


def test_full_is_refused_without_a_gpu_or_with_too_little_memory(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BaseModelError, match="no CUDA device"):
        subjects.check_gpu(["SDXL"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 * 10**9, 24 * 10**9))
    with pytest.raises(BaseModelError, match=r"FLUX.1-dev takes 54\.\d GB of the GPU, and 24\.0 GB are free"):
        subjects.check_gpu(["SDXL", "FLUX.1-dev"])


def test_memory_that_full_takes_is_what_its_first_lines_say(script: ModuleType) -> None:
    needed = [math.ceil(subjects.needed_bytes(component) / 1e9) for component in COMPONENTS.values()]
    assert "with {} or {} GB free".format(*needed) in script.__doc__
