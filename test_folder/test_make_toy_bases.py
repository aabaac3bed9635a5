"""The training of toy bases: every stage runs, and what it leaves serves every way to make an image."""

import json
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from in_venv import program
from PIL import Image

from examples import stage, train_denoiser, train_vae
from examples.architectures import SIDES, toy_vae
from examples.latents import even_out
from examples.lessons import any_picture, labels, levels, pixels_of, read_captions, read_drawings, save_drawings, scenes
from examples.stage import Task
from klora import Request, generate, load_model

CPU = torch.device("cpu")
DRAWN, OTHERS = 32, 24
each_base = pytest.mark.parametrize("base", ["sdxl", "flux-dev"])


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawings") / train_vae.DRAWINGS
    save_drawings(path, DRAWN, OTHERS, 2)
    return path


@pytest.fixture
def task(drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Task]:
    """A small task for a base, a number of steps and a batch; compilers are left out, for they take minutes."""
    monkeypatch.setattr(stage, "REPORT_STEPS", 1)
    monkeypatch.setattr(stage, "WARM_STEPS", 5)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_: None)
    for folder in ("state", "toys"):
        (tmp_path / folder).mkdir()
    (tmp_path / "state" / drawings.name).symlink_to(drawings)
    folders = (CPU, tmp_path / "state", tmp_path / "toys")
    return lambda base, steps=1, batch=4, rate=1e-3: Task(base, steps, batch, rate, *folders)


@each_base
def test_the_stages_leave_a_base_that_serves_every_way_to_make_an_image(task: Callable[..., Task], base: str) -> None:
    own = partial(task, base, batch=2)
    train_vae.train_vae(own(3))
    train_vae.train_decoder(own(3))
    train_vae.save_latents(own())
    train_denoiser.train_words(own(2))
    train_denoiser.train_denoiser(own(6))
    if base != "sdxl":
        train_denoiser.train_guidance(own(6))
    toys = own().toys
    assert not any(str(toys) in path.read_text() for path in toys.rglob("*.json"))
    assert len((toys / f"{base}-denoiser.jsonl").read_text().splitlines()) == 1
    model, side = load_model(base.split("-")[0], toys / base, CPU), SIDES[base]
    assert model.native_size == side
    picture, mask = any_picture(random.Random(0)), Image.new("L", (side, side), 255)
    for inputs in ({}, {"image": picture}, {"image": picture, "mask": mask}):
        [image] = generate(model, Request("a red circle", num_inference_steps=2, seed=0, **inputs))
        assert image.size == (side, side)


def test_the_program_takes_the_stages_in_their_order(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each base, with its own numbers, and guidance of FLUX.1's alone."""
    script, told = program("make-toy-bases"), list[Task | str]()
    monkeypatch.setattr(script.in_venv, "enter", lambda: None)
    monkeypatch.setattr(script, "STATE", task("sdxl").state)
    monkeypatch.setattr("sys.argv", ["make-toy-bases", "--stages", "guidance", "words", "vae", "--steps", "7"])
    for module, name in ((train_vae, "train_vae"), (train_denoiser, "train_words"), (train_denoiser, "train_guidance")):
        monkeypatch.setattr(module, name, lambda own, name=name: told.extend([name, own]))
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision("highest")
    assert told[::2] == ["train_vae", "train_words", "train_vae", "train_words", "train_guidance"]
    assert [own[:4] for own in told[1::2]][:2] == [("sdxl", 7, 8, 1.5e-3), ("sdxl", 7, 64, 1e-3)]
    assert {own.device for own in told[1::2]} == {CPU}


def test_the_decoder_learns_alone(task: Callable[..., Task]) -> None:
    """So that latents, and a denoiser that knows them, stay right."""
    vaes = []
    for train in (train_vae.train_vae, train_vae.train_decoder):
        train(task("sdxl", 2))
        vaes.append(diffusers.AutoencoderKL.from_pretrained(task("sdxl").folder / "vae").state_dict())
    changed = {name.split(".")[0] for name, tensor in vaes[0].items() if not torch.equal(tensor, vaes[1][name])}
    assert changed == {"decoder"}


@each_base
def test_a_vae_learns_pictures_of_the_size_that_its_base_draws(task: Callable[..., Task], base: str) -> None:
    """One of SDXL's that had learnt larger ones lost a mosaic's lines."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Stage, "learn", lambda self, lesson, **inputs: seen.append(inputs) or 1 / 0)
        for train in (train_vae.train_vae, train_vae.train_decoder):
            with pytest.raises(ZeroDivisionError):
                train(task(base))
            toy_vae(base).save_pretrained(task(base).folder / "vae")
    assert [inputs["pixels"].shape for inputs in seen] == [(4, 3, SIDES[base], SIDES[base])] * 2


def test_a_denoiser_begins_with_what_is_there(task: Callable[..., Task]) -> None:
    """And the first with nothing: how far it has come is not lost, nor the words its encoders know."""
    own = task("sdxl")
    train_vae.train_vae(own)
    train_vae.save_latents(own)
    train_denoiser.train_denoiser(own)
    left = train_denoiser.pipeline(own).unet.state_dict()
    again = train_denoiser.pipeline(own).unet.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in left.items())
    train_vae.train_vae(own)
    assert not torch.equal(train_denoiser.pipeline(own).unet.state_dict()["conv_in.weight"], left["conv_in.weight"])


@each_base
def test_evening_out_changes_the_latents_and_no_picture(base: str) -> None:
    torch.manual_seed(0)
    vae, pixels = toy_vae(base), levels(pixels_of(any_picture(random.Random(i)) for i in range(6)), 128)
    with torch.no_grad():
        vae.encoder.conv_out.weight[0] *= 5
        before, uneven = encoded(vae, pixels)
        even_out(vae, pixels)
        after, even = encoded(vae, pixels)
    assert (before - after).abs().max() < 1e-4
    least = uneven.mean() / 100  # a direction that varies less than this stays the less
    assert torch.allclose(even, (uneven / uneven.clamp(min=least)).sort().values, atol=1e-3)
    assert uneven.max() > 2 * uneven.mean() and vae.config.scaling_factor == 1


def encoded(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the VAE makes of pictures, and the variances of their latents' principal directions, rising."""
    means = vae.encode(pixels).latent_dist.mean
    return vae.decode(means).sample, torch.linalg.eigvalsh(torch.cov(means.transpose(0, 1).flatten(1)))


def test_a_figure_comes_eight_times_by_one_name_in_other_styles_and_places() -> None:
    same = [scenes(number, number + 1, 1024)[0] for number in range(1, 1024, 128)]
    assert len(same) == 8
    assert len({re.search(r"(\w+ \w+)( on a| in front|,|$)", caption)[1] for _, caption in same}) == 1
    assert len({tuple(part.colour for part in scene.parts) for scene, _ in same}) == 1
    assert len({scene.parts for scene, _ in same}) == 8
    assert len({scene.style for scene, _ in same}) > 1 and len({scene.ground for scene, _ in same}) > 1


def test_drawings_are_the_scenes_in_their_order_and_others_in_every_style(drawings: Path) -> None:
    pixels, captions = read_drawings(drawings, "scenes"), read_captions(drawings)
    some = scenes(0, DRAWN, DRAWN)
    assert captions == [caption for _, caption in some]
    assert torch.equal(pixels, pixels_of(scene.draw(seed) for seed, (scene, _) in enumerate(some)))
    others = read_drawings(drawings, "others")
    wanted = [np.asarray(any_picture(random.Random(f"picture {number}"))) for number in range(OTHERS)]
    assert np.array_equal(others.permute(0, 2, 3, 1).numpy(), np.stack(wanted))


@each_base
def test_text_encoders_learn_what_captions_name_and_a_new_denoiser_finds_them(
    task: Callable[..., Task], base: str
) -> None:
    own = task(base, 24, 8, 3e-3)
    train_vae.train_vae(own._replace(steps=1))
    before = train_denoiser.pipeline(own)
    train_denoiser.train_words(own)
    losses = [json.loads(line)["loss"] for line in (own.state / f"{base}-words.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    left = train_denoiser.pipeline(own)
    assert not (own.folder / "model_index.json").exists()  # no base yet
    for part in ("text_encoder", "text_encoder_2"):
        old, new = (pipe.components[part].state_dict() for pipe in (before, left))
        assert any(not torch.equal(tensor, new[name]) for name, tensor in old.items())


@each_base
def test_captions_are_encoded_in_training_as_in_use(task: Callable[..., Task], base: str) -> None:
    toy_vae(base).save_pretrained(task(base).folder / "vae")
    model, captions = train_denoiser.family(task(base)), ["a red circle", "", "a bix robot, " + 3 * "pixel art "]
    with torch.no_grad():
        found = train_denoiser.encoded(model, train_denoiser.tokenized(model, captions, CPU))
        wanted = model.encode_prompt(captions)
    assert all(torch.equal(part, wanted[name]) for name, part in found.items()) and len(found) == 2


def test_guidance_is_taught_as_two_passes_with_and_without_a_caption(task: Callable[..., Task]) -> None:
    own = task("flux-dev", rate=0.0)
    toy_vae("flux-dev").save_pretrained(own.folder / "vae")
    train_vae.save_latents(own)
    model = train_denoiser.family(own)
    for parameter in model.denoiser.parameters():  # which begins with saying nothing
        torch.nn.init.normal_(parameter, std=0.05)
    model.pipe.save_pretrained(own.folder)
    told: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        learn = stage.Stage.learn
        patch.setattr(
            stage.Stage, "learn", lambda self, lesson, **inputs: told.append(inputs) or learn(self, lesson, **inputs)
        )
        train_denoiser.train_guidance(own)
    model, [inputs] = train_denoiser.family(own), told

    def says(tokens: dict[str, torch.Tensor], guidance: torch.Tensor) -> torch.Tensor:
        read = train_denoiser.encoded(model, tokens) | {"guidance": guidance}
        return model.predict(inputs["clean"], inputs["noise"], inputs["times"], read).predicted

    asked, guidance = {name: inputs[name] for name in model.text_encoders}, inputs["guidance"]
    with torch.no_grad():
        without = says(train_denoiser.tokenized(model, [""] * 4, CPU), torch.ones(4))
        target = without + guidance.view(4, 1, 1, 1) * (says(asked, torch.ones(4)) - without)
        loss = (says(asked, guidance) - target).square().mean()
    logged = json.loads((own.state / "flux-dev-guidance.jsonl").read_text())["loss"]
    assert logged == pytest.approx(float(loss), rel=0.01) and logged > 0.01
    assert guidance.min() >= 1 and guidance.max() <= 6 and guidance.std() > 0


def test_labels_are_what_a_caption_says() -> None:
    said = labels("a small red circle and a blue star on a white background, in pencil style")
    assert sum(said) == 5  # two coloured shapes, ground, size, style
    assert sum(labels("a sbu robot")) == 1  # its kind
    assert not any(labels("a sbu toy"))
