"""The training of toy bases: every stage runs and goes on, and what it leaves serves every way to make an image."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from in_venv import program
from PIL import Image

from examples import stage
from examples.architectures import SIDES, toy_sdxl, toy_vae, with_finest_attention
from examples.latents import even_out
from examples.lessons import any_picture, labels, pictures, pixels_of, scenes
from klora import Request, generate, load_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
each_base = pytest.mark.parametrize("base", ["sdxl", "flux-dev"])


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, small and in a folder of its own; compilers are left out, for they take minutes."""
    module = program("make-toy-bases")
    small = {"STATE": tmp_path / "state", "TOYS": tmp_path / "toys", "SCENES": 32, "MEASURED": 16, "BATCH": {"cpu": 4},
             "WORD_BATCH": 16}  # fmt: skip
    monkeypatch.setattr(stage, "REPORT_STEPS", 1)
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    for folder in (module.STATE, module.TOYS):
        folder.mkdir()
    torch.compiler.set_stance("force_eager")
    yield module
    torch.compiler.set_stance("default")


@each_base
def test_the_stages_leave_a_base_that_serves_every_way_to_make_an_image(script: ModuleType, base: str) -> None:
    script.train_vae(base, 3, CPU)
    script.train_decoder(base, 3, CPU)
    script.save_latents(base, CPU)
    script.train_words(base, 2, CPU)
    script.train_denoiser(base, 10, CPU)
    stages = [base, f"{base}-longer"] if "longer" in script.STEPS[base] else [base]
    if len(stages) > 1:
        script.train_longer(base, 10, CPU)
    assert not any(str(script.TOYS) in path.read_text() for path in script.TOYS.rglob("*.json"))
    assert [len((script.TOYS / f"{stage}.jsonl").read_text().splitlines()) for stage in stages] == [1] * len(stages)
    model = load_model(base.split("-")[0], script.TOYS / base, torch.device("cpu"))
    side = SIDES[base]
    assert model.native_size == side
    picture, mask = any_picture(random.Random(0)), Image.new("L", (side, side), 255)
    for inputs in ({}, {"image": picture}, {"image": picture, "mask": mask}):
        [image] = generate(model, Request("a red circle", num_inference_steps=2, seed=0, **inputs))
        assert image.size == (side, side)


def test_the_decoder_learns_alone(script: ModuleType) -> None:
    """So that latents, and a denoiser that knows them, stay right."""
    vaes = []
    for part in ("vae", "decoder"):
        getattr(script, f"train_{part}")("sdxl", 2, CPU)
        vaes.append(diffusers.AutoencoderKL.from_pretrained(script.TOYS / "sdxl" / "vae").state_dict())
    changed = {name.split(".")[0] for name, tensor in vaes[0].items() if not torch.equal(tensor, vaes[1][name])}
    assert changed == {"decoder"}


def test_a_denoiser_begins_with_what_is_there(script: ModuleType) -> None:
    """And the first with nothing: how far it has come is not lost, nor the words its encoders know."""
    script.train_vae("sdxl", 1, CPU)
    script.save_latents("sdxl", CPU)
    script.train_denoiser("sdxl", 1, CPU)
    left = script.pipeline("sdxl").unet.state_dict()
    again = script.pipeline("sdxl").unet.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in left.items())
    script.train_vae("sdxl", 1, CPU)
    assert not torch.equal(script.pipeline("sdxl").unet.state_dict()["conv_in.weight"], left["conv_in.weight"])


def test_a_stage_goes_on_from_where_it_was(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """In as many steps in all, to the same weights."""
    modules = [torch.nn.Linear(3, 3) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())

    def trained(name: str, module: torch.nn.Module, stop: int) -> None:
        own = stage.Stage(name, 6, {"module": module}, 0.1, script.STATE)
        for step in own.run():
            if step == stop:
                own.save()
                return
            own.advance(module(torch.full((1, 3), float(step))).square().sum())
        own.finish(script.TOYS)

    trained("whole", modules[0], 6)
    trained("parts", modules[1], 2)
    torch.nn.init.zeros_(modules[1].weight)  # what is gone on with is what the file holds
    trained("parts", modules[1], 6)
    assert "parts: going on from step 2" in capsys.readouterr().out
    assert torch.equal(modules[0].weight, modules[1].weight)


@each_base
def test_evening_out_changes_the_latents_and_no_picture(script: ModuleType, base: str) -> None:
    torch.manual_seed(0)
    vae, pixels = toy_vae(base), pixels_of(any_picture(random.Random(i)) for i in range(12))
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


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_the_scenes_in_their_order_whoever_draws_them(workers: int) -> None:
    some = scenes(0, 5, 800)
    drawn = pixels_of(scene.draw(seed) for seed, (scene, _) in enumerate(some))
    assert torch.equal(torch.cat(list(pictures(some, 2, workers))), drawn)


@each_base
def test_text_encoders_learn_what_captions_name_and_a_new_denoiser_finds_them(script: ModuleType, base: str) -> None:
    script.train_vae(base, 1, CPU)
    before = script.pipeline(base)
    script.train_words(base, 60, CPU)
    losses = [json.loads(line)["loss"] for line in (script.STATE / f"{base}-words.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    left = script.pipeline(base)
    assert not (script.TOYS / base / "model_index.json").exists()  # no base yet
    for part in ("text_encoder", "text_encoder_2"):
        old, new = (pipe.components[part].state_dict() for pipe in (before, left))
        assert any(not torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_labels_are_what_a_caption_says() -> None:
    said = labels("a small red circle and a blue star on a white background, in pencil style")
    assert sum(said) == 5  # two coloured shapes, ground, size, style
    assert sum(labels("a sbu robot")) == 1  # its kind
    assert not any(labels("a sbu toy"))


def test_guidance_is_replaced_while_it_is_drawn_and_given_back(script: ModuleType) -> None:
    class Denoiser(torch.nn.Module):
        def forward(self, guidance: torch.Tensor) -> torch.Tensor:
            return guidance

    denoiser = Denoiser()
    with script.any_guidance(denoiser, torch.tensor(5.0)):
        assert denoiser(guidance=torch.tensor(1.0)) == 5
    assert denoiser(guidance=torch.tensor(1.0)) == 1


def test_attention_among_the_finest_cells_adds_nothing_until_it_is_trained() -> None:
    unet = toy_sdxl(toy_vae("sdxl")).unet
    more = with_finest_attention(unet)
    beyond = set(more.state_dict()) - set(unet.state_dict())
    assert {name.split(".attentions.")[0] for name in beyond} == {"down_blocks.0", "up_blocks.2"}
    again = with_finest_attention(more)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in more.state_dict().items())
    asked = {"encoder_hidden_states": torch.randn(1, 32, 192), "timestep": 500, "return_dict": False}
    asked["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 96), "time_ids": torch.randn(1, 6)}
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(*(net(latents, **asked)[0] for net in (unet, more)))
        again.up_blocks[2].attentions[0].proj_out.weight += 0.01
        assert not torch.equal(*(net(latents, **asked)[0] for net in (unet, again)))
