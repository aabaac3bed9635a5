"""The trainer: what it learns, what it leaves alone, and that a run taken up again is the same run. What it is shown
is in test_draws.py."""

import dataclasses
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from klora import LoRA, Request, generate, load_model, save_lora
from klora.errors import RequestError
from klora.models.family import Family
from klora.models.linears import linear_shapes
from klora.training import loop
from klora.training.dataset import Picture
from klora.training.loop import Load, Progress, new_layers, train_lora
from klora.training.memory import Mode
from test_folder.tiny import BASES
from test_folder.trainer.material import CPU, QUICK, config, picture, png


@pytest.fixture(scope="module")
def finished(bases: Path, pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoRA]:
    """The folder and the LoRA of a run of SDXL by QUICK alone."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train_lora(partial(load_model, "sdxl", bases / "sdxl"), pictures, QUICK, folder)


def bits(lora: LoRA) -> dict[str, bytes]:
    return {name: pair.A.numpy().tobytes() + pair.B.numpy().tobytes() for name, pair in lora.items()}


def recording(load: Load, seen: list[Family]) -> Load:
    """The same, which also keeps what it loads."""

    def recorded(**options: Any) -> Family:
        seen.append(load(**options))
        return seen[-1]

    return recorded


def never(**options: Any) -> Any:
    """What must not be called."""
    raise AssertionError(options)


# What is learnt


def test_a_lora_begins_as_published_and_every_layer_otherwise() -> None:
    shapes = {"one": (5, 4000), "two": (5, 4000)}
    begun = [pair for seed in (0, 1) for pair in new_layers(shapes, 4, seed, CPU).values()]
    assert len({pair.A.detach().numpy().tobytes() for pair in begun}) == 4
    for pair in begun:
        assert float(pair.A.detach().std()) == pytest.approx(1 / 4, rel=0.03) and not pair.B.any()


def test_the_base_is_as_it_was_and_every_layer_has_learnt(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    models: list[Family] = []
    lora = train_lora(recording(load, models), pictures, QUICK, tmp_path)
    after, before = models[-1].denoiser.state_dict(), load(device=CPU).denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in models[-1].denoiser.parameters())
    assert list(lora) == QUICK.targets(linear_shapes(models[-1].denoiser))
    assert all(pair.B.abs().max() > 0 and pair.A.dtype == torch.float32 for pair in lora.values())


def test_nothing_is_trained_through_cudnn_attention_however_the_base_is_held(
    load: Load, pictures: list[Picture], tmp_path: Path
) -> None:
    """Whose backward pass fails on an H200; checkpointing, which calls layers from the backward pass, included."""
    allowed, before = set[bool](), torch.backends.cuda.cudnn_sdp_enabled()
    models, compiled = list[Family](), list[dict[str, Any]]()

    def watched(**options: Any) -> Family:
        model = load(**options)
        for block in model.denoiser.modules() if model.denoiser is not None else ():
            if type(block).__name__ in ("Attention", "FluxAttention"):
                block.register_forward_pre_hook(lambda *_: allowed.add(torch.backends.cuda.cudnn_sdp_enabled()))
        if model.denoiser is not None:
            model.denoiser.compile_repeated_blocks = lambda **options: compiled.append(options)
        return model

    settings = config(steps=2, gradient_checkpointing="on", compile="on", lora_rank=None, learning_rate=None)
    heard: list[Progress] = []
    lora = train_lora(recording(watched, models), pictures, settings, tmp_path, on_progress=heard.append)
    assert {len(pair.A) for pair in lora.values()} == {models[-1].recipe.rank}
    assert heard[-1].learning_rate == models[-1].recipe.learning_rate
    assert allowed == {False} and torch.backends.cuda.cudnn_sdp_enabled() == before
    assert models[-1].denoiser.is_gradient_checkpointing and compiled == [{"dynamic": True}]


def test_what_is_done_is_gone_before_the_next_part_comes(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    alive: list[tuple[str, weakref.ref[Any]]] = []

    def watched(**options: Any) -> Family:
        assert not [name for name, part in alive if part() is not None]
        model = load(**options)
        assert ("text" in options["parts"]) == bool(model.text_encoders)
        assert (model.pipe.vae.device.type == "meta") == ("vae" not in options["parts"])
        assert (model.denoiser.device.type == "meta") == ("denoiser" not in options["parts"])
        alive.extend((name, weakref.ref(encoder)) for name, encoder in model.text_encoders.items())
        if options["parts"] == ("vae",):
            alive.append(("vae", weakref.ref(model.pipe.vae)))
            assert model.pipe.vae.dtype == torch.float32
        return model

    def of_the_class() -> list[Picture]:
        assert not [name for name, part in alive if part() is not None]
        base = load(device=CPU)
        alive.append(("base", weakref.ref(base.denoiser)))
        request = Request("a toy", num_inference_steps=1)
        return [Picture("0.png", png(image), None, None) for image in generate(base, request)]

    settings = config(steps=1, prior_preservation="class_images", class_word="toy")
    train_lora(watched, pictures, settings, tmp_path, class_pictures=of_the_class)
    assert [name for name, _ in alive] == ["text_encoder", "text_encoder_2", "vae", "base", "vae"]


@pytest.mark.parametrize(("family", "most", "measures"), [("sdxl", 10, 3), ("flux", 2, 2)])
def test_training_lowers_the_loss_on_fixed_draws(
    bases: Path,
    pictures: list[Picture],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    most: int,
    measures: int,
) -> None:
    assert loop.MEASURES == 10
    monkeypatch.setattr(loop, "MEASURES", most)
    heard: list[Progress] = []
    load, settings = partial(load_model, family, bases / BASES[family]), config(steps=30, learning_rate=1e-2)
    train_lora(load, pictures, settings, tmp_path, on_progress=heard.append)
    measured = [progress.fixed_loss for progress in heard if progress.fixed_loss is not None]
    assert heard[0].step == 0 and heard[-1].step == 30
    assert len(measured) == 1 + measures  # at the start, and every tenth step or less often
    assert measured[-1] < 0.95 * measured[0]


def test_a_bf16_base_is_sampled_and_does_not_hold_small_steps_back(
    bases: Path, pictures: list[Picture], tmp_path: Path
) -> None:
    load = partial(load_model, "flux", bases / "flux-dev")
    settings = config(steps=3, learning_rate=5e-5, precision="bf16", sample_steps=1, sample_prompts="a dog")
    shapes = linear_shapes(load(device=CPU, parts=()).denoiser)
    start = new_layers({name: shapes[name] for name in settings.targets(shapes)}, 4, settings.seed, CPU)
    models: list[Family] = []
    lora = train_lora(recording(load, models), pictures, settings, tmp_path)
    assert models[-1].denoiser.dtype == torch.bfloat16
    assert (tmp_path / "samples" / "step_000003_0.png").is_file()
    unmoved = [float((start[name].A == pair.A).float().mean()) for name, pair in lora.items()]
    assert np.mean(unmoved) < 0.01


def test_the_base_is_held_as_there_is_room_for(
    sdxl: Load, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def loading(**options: Any) -> Family:
        asked.update(options)
        if "denoiser" in options["parts"]:
            raise KeyboardInterrupt
        return sdxl(**options)

    monkeypatch.setattr(loop, "mode_for", lambda *_: Mode(torch.bfloat16, "nf4", checkpointing=True, compiled=False))
    with pytest.raises(KeyboardInterrupt):
        train_lora(loading, pictures, QUICK, tmp_path)
    assert (asked["dtype"], asked["quantized"]) == (torch.bfloat16, "nf4")


def test_stock_diffusers_applies_the_file_as_we_do(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    model = load(device=CPU)
    path = save_lora(tmp_path / "lora.safetensors", train_lora(load, pictures, QUICK, tmp_path), model.component)
    request = Request("a sbu toy", num_inference_steps=3, guidance_scale=3.0, seed=1)
    [ours] = generate(model, request, content=model.read_lora(path))
    pipe = diffusers.DiffusionPipeline.from_pretrained(model.pipe.config._name_or_path)
    pipe.load_lora_weights(path)
    [theirs] = generate(type(model)(pipe), request)
    # One level of 255: peft adds its product after the base's, we merge it into the weight.
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


# Interruption and resumption

RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("flux", {"lr_scheduler": "cosine", "caption_dropout_rate": 0.5}),
    "ema": ("sdxl", {"ema_decay": 0.9, "horizontal_flip": True, "batch_size": 2}),
    "adafactor": ("sdxl", {"optimizer": "adafactor", "lr_warmup_steps": 4, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_taken_up_again_is_the_same_run(bases: Path, pictures: list[Picture], tmp_path: Path, case: str) -> None:
    family, given = RESUMED[case]
    load, settings = partial(load_model, family, bases / BASES[family]), config(steps=5, **given)
    (tmp_path / "whole").mkdir()
    whole = train_lora(load, pictures, settings, tmp_path / "whole")

    def stop_at_3(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(load, pictures, settings, tmp_path, on_progress=stop_at_3)
    steps: list[int] = []
    state = tmp_path / "run.safetensors"
    resumed = train_lora(
        load, pictures, settings, tmp_path, resume=state, on_progress=lambda progress: steps.append(progress.step)
    )
    assert steps == [4, 5]
    assert bits(resumed) == bits(whole)
    ours, theirs = (load_file(folder / "run.safetensors") for folder in (tmp_path, tmp_path / "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_interruption_inside_a_step_leaves_the_last_checkpoint(
    sdxl: Load, pictures: list[Picture], finished: tuple[Path, LoRA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-updated parameters belong to no step."""
    step, calls = torch.optim.AdamW.step, []

    def broken_off(self: Any, *args: Any) -> None:
        step(self, *args)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", broken_off)
    with pytest.raises(KeyboardInterrupt):
        train_lora(sdxl, pictures, config(checkpoint_interval=3), tmp_path)
    monkeypatch.undo()
    resumed = train_lora(sdxl, pictures, QUICK, tmp_path, resume=tmp_path / "run.safetensors")
    assert bits(resumed) == bits(finished[1])


def test_a_finished_run_has_nothing_to_take_up_and_loads_nothing(
    pictures: list[Picture], finished: tuple[Path, LoRA], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"^steps is 6, and resume_from has done 6\. Expected more\.$"):
        train_lora(never, pictures, QUICK, tmp_path, resume=finished[0] / "run.safetensors")


def test_only_the_latest_checkpoints_are_kept_and_writing_them_is_not_timed(
    sdxl: Load, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first step takes a second, the next two and so on, a checkpoint a hundred, and four reports are due."""
    clock, heard, losses, saved = [0.0], list[Progress](), list[float](), list[int]()
    step, checkpoint = loop._Loop._step, loop._Loop._checkpoint

    def slower(self: Any) -> torch.Tensor:
        loss = step(self)
        losses.append(float(loss))
        clock[0] += len(losses)
        return loss

    def slow(self: Any) -> None:
        clock[0] += 100
        checkpoint(self)

    monkeypatch.setattr(loop, "REPORTS", 4)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(loop._Loop, "_step", slower)
    monkeypatch.setattr(loop._Loop, "_checkpoint", slow)
    settings = config(checkpoint_interval=2, keep_checkpoints=2)
    telling = {"on_progress": heard.append, "on_saved": lambda step, lora: saved.append(step)}
    lora = train_lora(sdxl, pictures, settings, tmp_path, **telling)
    assert saved == [2, 4, 6]
    begun, *told = heard
    assert (begun.step, begun.loss, begun.steps_per_second, begun.seconds_left) == (0, None, None, None)
    assert [progress.step for progress in told] == [2, 3, 5, 6]
    assert [progress.learning_rate for progress in told] == [1e-3] * 4
    assert [progress.steps_per_second for progress in told] == pytest.approx([2 / 3, 1 / 3, 1 / 5, 1 / 6])
    assert [progress.seconds_left for progress in told] == pytest.approx([6, 9, 5, 0])
    since = [sum(losses[:2]) / 2, losses[2], sum(losses[3:5]) / 2, losses[5]]
    assert [progress.loss for progress in told] == pytest.approx(since)
    assert [progress.fixed_loss is None for progress in heard] == [False, True, True, True, False]
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in kept] == ["lora_000004.safetensors", "lora_000006.safetensors"]
    file = kept[-1]
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    last = sdxl(device=CPU).read_lora(file)
    for name, pair in lora.items():
        torch.testing.assert_close(last[name].B.float(), pair.B, rtol=1e-3, atol=1e-6)


def test_samples_show_the_lora_and_disturb_nothing(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    """Whose alpha is not its rank, so that what is trained with and what is written could differ."""
    settings = config(steps=4, lora_alpha=10.0, ema_decay=0.5)
    plain = train_lora(load, pictures, settings, tmp_path)
    (tmp_path / "sampled").mkdir()
    sampling = {"sample_steps": 2, "sample_interval": 2, "sample_prompts": "a [trigger] toy\n\n a dog "}
    sampled = train_lora(load, pictures, dataclasses.replace(settings, **sampling), tmp_path / "sampled")
    files = sorted(path.name for path in (tmp_path / "sampled" / "samples").iterdir())
    assert files == ["step_000002_0.png", "step_000002_1.png", "step_000004_0.png", "step_000004_1.png"]
    assert bits(plain) == bits(sampled)
    for number, prompt in enumerate(("a sbu toy", "a dog")):  # all from the same seed
        request = Request(prompt, num_inference_steps=2, seed=QUICK.seed)
        [shown] = generate(load(device=CPU), request, content=sampled)
        with Image.open(tmp_path / "sampled" / "samples" / f"step_000004_{number}.png") as image:
            assert np.abs(np.asarray(image, int) - np.asarray(shown, int)).max() <= 1


# What is refused before it begins


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": "lion"}, "optimizer is lion and lion_pytorch is not installed. Expected adamw."),
        ({"precision": "nf4"}, "precision is nf4 and bitsandbytes is not installed. Expected bf16 or fp32."),
    ],
)
def test_a_missing_library_is_refused_before_anything_is_loaded(
    given: dict[str, Any], said: str, pictures: list[Picture], tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as refusal:
        train_lora(never, pictures, config(**given), tmp_path)
    assert str(refusal.value) == said


@pytest.mark.parametrize(
    ("caption", "mask", "said"),
    [("a dog " * 300, "white", "The prompt 'sbu, a dog .* tokens"), ("a dog", "black", "The mask of '0.png'")],
)
def test_a_caption_and_a_mask_are_refused_before_the_class_is_drawn(
    caption: str, mask: str, said: str, bases: Path, tmp_path: Path
) -> None:
    shown = picture(0, "red", caption=caption, mask=Image.new("L", (64, 64), mask))
    settings = config(prior_preservation="class_images", class_word="toy", mask_mode="provided", mask_min_weight=0.0)
    with pytest.raises(RequestError, match=f"^{said}"):
        load = partial(load_model, "flux", bases / "flux-dev")
        train_lora(load, [shown], settings, tmp_path, class_pictures=never)


# What two come to


def test_two_trained_loras_fuse(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    content, style = (train_lora(load, pictures, config(steps=3, seed=seed), tmp_path) for seed in (1, 2))
    facts: dict[str, float] = {}
    request = Request("a sbu toy", num_inference_steps=4)
    generate(load(device=CPU), request, content=content, style=style, record=facts.__setitem__)
    assert 0 < facts["style_share"] < 1
