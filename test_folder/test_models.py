"""Every family answers its six questions as diffusers and the mathematics do, and a request leaves no trace."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from klora.errors import BaseModelError
from klora.form.request import SCHEDULERS, Request
from klora.layers import attached
from klora.lora import LowRank, Plan
from klora.models import FAMILIES, load_model
from klora.models.family import Conditioning, Family, following
from klora.training.objective import draw_noise, draw_times, errors
from test_folder import tiny

CPU = torch.device("cpu")
BASES = {"sdxl": "sdxl", "flux-dev": "flux", "flux-schnell": "flux"}  # base: its family
PROMPT = "a photo of a sks dog"


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    """One of each base, shared: its parameters need no gradient, and no test may leave a trace in it."""
    loaded = {base: load_model(family, bases / base, CPU) for base, family in BASES.items()}
    for model in loaded.values():
        for part in (model.denoiser, model.pipe.vae, *model.text_encoders.values()):
            part.requires_grad_(False)
    return loaded


@pytest.fixture(params=BASES)
def model(models: dict[str, Family], request: pytest.FixtureRequest) -> Family:
    return models[request.param]


@pytest.fixture
def sdxl(models: dict[str, Family]) -> Family:
    return models["sdxl"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(width: int = 64, height: int = 64) -> Image.Image:
    """Coloured squares of 8 pixels."""
    cells = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(cells.repeat(8, axis=0).repeat(8, axis=1))


def pixels_of(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None]


def paint(model: Family, on_step: Callable[[int], None] = lambda step: None, **options: Any) -> np.ndarray:
    """Levels [N, H, W, 3] in 0 .. 255, of four steps of 64 x 64 unless the options say otherwise."""
    defaults = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 4, "seed": 0}
    request = Request(**(defaults | options))
    with torch.no_grad():
        images = model.sample(model.encode_prompt([request.prompt]), request, on_step)
    return np.stack([np.asarray(image, dtype=int) for image in images])


@contextmanager
def decoded_latents(model: Family) -> Iterator[list[Tensor]]:
    """What reaches the decoder of the VAE; every cell depends on the same cell of the latents alone."""
    seen: list[Tensor] = []
    hook = model.pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) and None)
    yield seen
    hook.remove()


def reconstruction(model: Family, image: Image.Image) -> Tensor:
    """The image through the VAE and back, [1, 3, H, W]; its latents are the posterior's mode."""
    with torch.no_grad():
        return model.pipe.vae(pixels_of(image), sample_posterior=False).sample


# load


def test_every_family_is_tested_here() -> None:
    assert set(BASES.values()) == set(FAMILIES)


def test_loaded_denoiser_has_the_weights_in_the_folder(model: Family, bases: Path) -> None:
    folder = bases / next(base for base in BASES if (bases / base).samefile(model.pipe.config._name_or_path))
    assert type(model) is FAMILIES[BASES[folder.name]]
    stored = load_file(folder / model.component / "diffusion_pytorch_model.safetensors")
    weights = model.denoiser.state_dict()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert getattr(model.pipe, model.component) is model.denoiser


@pytest.mark.parametrize(
    ("base", "steps", "guidance_scale"), [("sdxl", 30, 7.5), ("flux-dev", 28, 3.5), ("flux-schnell", 4, 0.0)]
)
def test_base_knows_its_own_defaults(models: dict[str, Family], base: str, steps: int, guidance_scale: float) -> None:
    model = models[base]
    assert (model.steps, model.guidance_scale, model.native_size) == (steps, guidance_scale, 64)


def test_half_precision_reaches_every_part_but_sdxls_vae(bases: Path) -> None:
    for base, family in BASES.items():
        model = load_model(family, str(bases / base), CPU, torch.bfloat16)
        parts = (model.denoiser, *model.text_encoders.values())
        assert {part.dtype for part in parts} == {torch.bfloat16}
        assert model.pipe.vae.dtype == (torch.float32 if family == "sdxl" else torch.bfloat16)


@pytest.mark.parametrize("option", [{}, {"image": photo(), "prompt_strength": 0.5}], ids=["prompt", "image"])
@pytest.mark.parametrize("base", BASES)
def test_half_precision_makes_about_the_same_image(
    models: dict[str, Family], bases: Path, base: str, option: dict[str, Any]
) -> None:
    """Mean of 3 levels of 255: bfloat16 has 8 bits, and a few steps amplify its rounding; another seed is 30 away."""
    half = load_model(BASES[base], bases / base, CPU, torch.bfloat16)
    assert np.abs(paint(half, **option) - paint(models[base], **option)).mean() < 3


def test_folder_of_a_fp16_variant_is_loaded(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    shutil.copytree(bases / "sdxl", folder)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert paint(load_model("sdxl", folder, CPU)).tolist() == paint(load_model("sdxl", bases / "sdxl", CPU)).tolist()


def denoiser_file(folder: Path) -> Path:
    return (
        next(folder / c for c in ("unet", "transformer") if (folder / c).is_dir())
        / "diffusion_pytorch_model.safetensors"
    )


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def of_another_shape(file: Path) -> None:
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.ndim == 2)
    save_file(weights | {name: torch.zeros(3, 3)}, file)


def incomplete(file: Path) -> None:
    weights = load_file(file)
    weights.pop(max(weights))
    save_file(weights, file)


DAMAGES = [  # what was done to the folder
    pytest.param(lambda folder: shutil.rmtree(folder), id="missing"),
    pytest.param(lambda folder: (folder / "model_index.json").unlink(), id="no model_index"),
    pytest.param(lambda folder: (folder / "model_index.json").write_text("{"), id="broken model_index"),
    pytest.param(lambda folder: cut_off(denoiser_file(folder)), id="denoiser cut off"),
    pytest.param(lambda folder: denoiser_file(folder).write_bytes(b""), id="denoiser empty"),
    pytest.param(lambda folder: denoiser_file(folder).unlink(), id="denoiser's file missing"),
    pytest.param(lambda folder: shutil.rmtree(folder / "vae"), id="no vae"),
    pytest.param(lambda folder: (folder / "vae" / "config.json").write_text("{"), id="broken config"),
    pytest.param(lambda folder: cut_off(folder / "text_encoder_2" / "model.safetensors"), id="encoder"),
    pytest.param(lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"), id="tokenizer"),
    pytest.param(lambda folder: of_another_shape(denoiser_file(folder)), id="other shape"),
    pytest.param(lambda folder: incomplete(denoiser_file(folder)), id="incomplete"),
    pytest.param(lambda folder: shutil.rmtree(folder / "tokenizer"), id="no tokenizer"),
    pytest.param(lambda folder: incomplete(folder / "text_encoder" / "model.safetensors"), id="encoder incomplete"),
    pytest.param(lambda folder: incomplete(folder / "vae" / denoiser_file(folder).name), id="vae incomplete"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("base", ["sdxl", "flux-dev"])
def test_damaged_folder_is_refused_in_a_sentence(
    bases: Path, tmp_path: Path, base: str, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / base
    shutil.copytree(bases / base, folder)
    damage(folder)
    with pytest.raises(BaseModelError, match=re.escape(str(folder))) as refusal:
        load_model(BASES[base], folder, CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "base"), [("sdxl", "flux-dev"), ("flux", "sdxl"), ("sdxl", "safety-checker"), ("video", "sdxl")]
)
def test_folder_of_another_family_is_refused_in_a_sentence(bases: Path, family: str, base: str) -> None:
    with pytest.raises(BaseModelError, match=re.escape(str(bases / base))):
        load_model(family, bases / base, CPU)


# The denoiser's layers, in the order in which they run.


def called_linears(model: Family) -> list[str]:
    """Names of the linear layers in the order of their first call while an image is made."""
    called: dict[str, None] = {}
    hooks = [
        model.denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: called.setdefault(n))
        for name in tiny.linear_shapes(model.denoiser)
    ]
    paint(model, num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    return list(called)


def test_lora_layers_come_in_the_order_of_their_first_call(model: Family, tmp_path: Path) -> None:
    shapes = tiny.linear_shapes(model.denoiser)
    order = called_linears(model)
    layers = tiny.random_lora(dict(reversed(shapes.items())), 1, seed=0)
    path = tiny.save_lora(tmp_path / "lora.safetensors", layers, prefix=model.component)
    assert set(order) == set(shapes)
    assert list(model.read_lora(path)) == order
    assert order != list(shapes)


def test_unet_goes_down_then_through_the_middle_then_up(sdxl: Family, tmp_path: Path) -> None:
    layers = tiny.random_lora(tiny.linear_shapes(sdxl.denoiser), 1, seed=0)
    names = list(sdxl.read_lora(tiny.save_lora(tmp_path / "lora.safetensors", layers)))
    stages = [name.split("_")[0] for name in names if "_block" in name.split(".")[0]]
    assert [a for a, b in pairwise([*stages, ""]) if a != b] == ["down", "mid", "up"]


@pytest.mark.parametrize("engine", ["gated", "merged"])
def test_every_linear_of_the_denoiser_is_alive(model: Family, engine: str) -> None:
    """One LoRA on one layer at a time: 1e-4 is a hundred times the rounding of a float32 forward call."""
    unet = model.component == "unet"
    inputs = (tiny.unet_inputs if unet else tiny.flux_inputs)(model.denoiser)
    with torch.no_grad():
        before = model.denoiser(**inputs).sample
        for name, shape in tiny.linear_shapes(model.denoiser).items():
            A, B = tiny.random_lora({name: shape}, 4, seed=0, std=1.0)[name]
            with attached(model.denoiser, Plan.constant(({name: LowRank(A, B)},), (1.0,)), engine=engine):
                change = (model.denoiser(**inputs).sample - before).abs().max()
            assert change > 1e-4, name
        assert torch.equal(model.denoiser(**inputs).sample, before)


def test_flux_lora_may_adapt_the_layers_that_the_published_code_forgets(models: dict[str, Family]) -> None:
    """HVision-NKU/K-LoRA#17: written with setattr(linear, "", new), they never ran."""
    shapes = tiny.linear_shapes(models["flux-dev"].denoiser)
    forgotten = ("attn.to_out.0", "ff.net.2", "ff_context.net.2", "norm1_context.linear")
    assert {f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in forgotten} <= shapes.keys()


# encode_images, encode_prompt


def test_encoded_images_are_the_posterior_as_the_denoiser_scales_it(model: Family) -> None:
    vae, pixels = model.pipe.vae, pixels_of(photo(64, 32))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        seen = model.encode_images(pixels)
    shift = vae.config.shift_factor or 0.0
    assert seen.mean.shape == (1, vae.config.latent_channels, 4, 8)
    assert torch.equal(seen.mean, (posterior.mean - shift) * vae.config.scaling_factor)
    assert torch.equal(seen.std, posterior.std * vae.config.scaling_factor)


def test_decoding_encoded_images_gives_the_vaes_own_reconstruction(model: Family) -> None:
    vae = model.pipe.vae
    with torch.no_grad():
        latents = model.encode_images(pixels_of(photo())).mean
        decoded = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    torch.testing.assert_close(decoded, reconstruction(model, photo()), rtol=1e-4, atol=1e-5)


def test_prompt_is_encoded_as_the_pipeline_does(model: Family) -> None:
    length = {"unet": 77, "transformer": 512 if model.guidance_scale else 256}[model.component]
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with torch.no_grad():
        seen = model.encode_prompt([PROMPT, "a cat"])
        options = {} if model.component == "unet" else {"prompt_2": None, "max_sequence_length": length}
        meant = model.pipe.encode_prompt([PROMPT, "a cat"], **options)
    width = 64 if model.component == "unet" else 32
    assert seen["prompt_embeds"].shape == (2, length, width)
    assert seen["pooled_prompt_embeds"].shape == (2, 32)
    assert torch.equal(seen[names[0]], meant[0])
    assert torch.equal(seen[names[1]], meant[2 if model.component == "unet" else 1])
    assert not torch.equal(seen["prompt_embeds"][0], seen["prompt_embeds"][1])


def test_negative_prompt_changes_what_sdxl_steers_away_from_and_nothing_else(sdxl: Family) -> None:
    request = Request(PROMPT, num_inference_steps=4, seed=0)
    with torch.no_grad():
        plain, steered = (sdxl.encode_prompt([PROMPT], negative) for negative in (None, ["a cat"]))
        before, after = (np.asarray(sdxl.sample(c, request, lambda _: None)[0], int) for c in (plain, steered))
    changed = {name for name in plain if not torch.equal(plain[name], steered[name])}
    assert changed == {"negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    assert np.abs(after - before).mean() > 1


# predict, and the loss that training makes of it


def naive_sdxl_loss(model: Family, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
    """DDPM with SDXL's scaled-linear betas; original and target size are that of the latents, uncropped."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = (torch.rand(len(latents), generator=generator) * 1000).long()
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timesteps]
    noised = torch.stack([k**0.5 * x + (1 - k) ** 0.5 * n for k, x, n in zip(kept, latents, noise, strict=True)])
    height, width = 8.0 * latents.shape[2], 8.0 * latents.shape[3]
    added = {
        "text_embeds": conditioning["pooled_prompt_embeds"],
        "time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]]).repeat(len(latents), 1),
    }
    predicted = model.denoiser(noised, timesteps, conditioning["prompt_embeds"], added_cond_kwargs=added).sample
    return torch.stack([((p - n) ** 2).mean() for p, n in zip(predicted, noise, strict=True)])


def naive_flux_loss(model: Family, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
    """Rectified flow on a straight line from latents to noise; a token is 2 x 2 cells, channel by channel."""
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.sigmoid(torch.randn(len(latents), generator=generator))
    mixed = torch.stack([(1 - s) * x + s * n for s, x, n in zip(sigmas, latents, noise, strict=True)])
    places = [(row, column) for row in range(latents.shape[2] // 2) for column in range(latents.shape[3] // 2)]

    def tokens(cells: Tensor) -> Tensor:
        return torch.stack([cells[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r, c in places], dim=1)

    predicted = model.denoiser(
        hidden_states=tokens(mixed),
        timestep=sigmas,
        guidance=torch.ones(len(latents)) if model.denoiser.config.guidance_embeds else None,
        encoder_hidden_states=conditioning["prompt_embeds"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        img_ids=torch.tensor([(0.0, row, column) for row, column in places]),
        txt_ids=torch.zeros(conditioning["prompt_embeds"].shape[1], 3),
    ).sample
    return torch.stack([((p - t) ** 2).mean() for p, t in zip(predicted, tokens(noise - latents), strict=True)])


def loss(model: Family, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
    """As training computes it when it is told nothing."""
    noise = draw_noise(latents, 0, generator)
    times = draw_times(model.recipe.times, latents, generator)
    return errors(model.predict(latents, noise, times, conditioning))


NAIVE_LOSS = {"sdxl": naive_sdxl_loss, "flux-dev": naive_flux_loss, "flux-schnell": naive_flux_loss}


def training_batch(model: Family) -> tuple[Tensor, Conditioning]:
    """Four examples, 32 pixels wide and 64 high."""
    with torch.no_grad():
        pixels = torch.rand(4, 3, 64, 32, generator=seeded(5)) * 2 - 1
        return model.encode_images(pixels).mean, model.encode_prompt([PROMPT, "a cat", "a red castle", "a dog"])


@pytest.mark.parametrize("base", BASES)
def test_loss_is_the_textbooks(models: dict[str, Family], base: str) -> None:
    latents, conditioning = training_batch(models[base])
    with torch.no_grad():
        seen = loss(models[base], latents, conditioning, seeded(1))
        meant = NAIVE_LOSS[base](models[base], latents, conditioning, seeded(1))
    assert seen.shape == (4,) and seen.dtype == torch.float32
    torch.testing.assert_close(seen, meant, rtol=1e-5, atol=1e-6)


def test_loss_depends_on_the_generator_alone(model: Family) -> None:
    batch = training_batch(model)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second, other = (loss(model, *batch, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.isclose(first, other).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_of_a_v_prediction_base_is_that_of_the_velocity(bases: Path, tmp_path: Path) -> None:
    """v = sqrt(kept) noise - sqrt(1 - kept) latents (arXiv:2202.00512)."""
    folder = tmp_path / "v"
    shutil.copytree(bases / "sdxl", folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    model = load_model("sdxl", folder, CPU)
    latents, conditioning = training_batch(model)
    outputs: list[Tensor] = []
    model.denoiser.register_forward_hook(lambda module, inputs, output: outputs.append(output.sample) and None)
    with torch.no_grad():
        seen, generator = loss(model, latents, conditioning, seeded(1)), seeded(1)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = (torch.rand(4, generator=generator) * 1000).long()
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timesteps][:, None, None, None]
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(seen, (outputs[0] - velocity).square().flatten(1).mean(1), rtol=1e-5, atol=1e-6)


def test_sdxl_is_told_the_size_and_crop_that_the_conditioning_names(sdxl: Family) -> None:
    latents, conditioning = training_batch(sdxl)
    own = torch.tensor([[64.0, 32.0, 0.0, 0.0, 64.0, 32.0]] * 4)
    cropped = torch.tensor([[640.0, 480.0, 8.0, 16.0, 64.0, 32.0]] * 4)
    with torch.no_grad():
        plain = loss(sdxl, latents, conditioning, seeded())
        same, other = (loss(sdxl, latents, {**conditioning, "time_ids": ids}, seeded()) for ids in (own, cropped))
    assert torch.equal(plain, same)
    assert not torch.isclose(plain, other).any()


def test_gradients_reach_the_lora_and_nothing_else(model: Family) -> None:
    lora, batch = trainable_lora(model), training_batch(model)
    loss_with(model, lora, batch).backward()
    for name, pair in lora.items():
        assert pair.A.grad is not None and pair.A.grad.abs().max() > 0, name
        assert pair.B.grad is not None and pair.B.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())


def test_gradient_is_the_slope_of_the_loss(model: Family) -> None:
    """By a central difference along the gradient; 1 % for its truncation and the float32 rounding of the loss."""
    lora, batch = trainable_lora(model), training_batch(model)
    loss_with(model, lora, batch).backward()
    factors = [factor for pair in lora.values() for factor in (pair.A, pair.B)]
    norm = torch.stack([factor.grad.norm() for factor in factors]).norm()
    losses = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            for factor in factors:
                factor += step * factor.grad / norm
            losses.append(loss_with(model, lora, batch))
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-4, norm, rtol=0.01, atol=0)


def trainable_lora(model: Family) -> dict[str, LowRank]:
    drawn = tiny.random_lora(tiny.linear_shapes(model.denoiser), 2, seed=0)
    return {name: LowRank(A.requires_grad_(), B.requires_grad_()) for name, (A, B) in drawn.items()}


def loss_with(model: Family, lora: dict[str, LowRank], batch: tuple[Tensor, Conditioning]) -> Tensor:
    with attached(model.denoiser, Plan.constant((lora,), (1.0,)), engine="gated"):
        return loss(model, *batch, seeded(1)).mean()


# sample


def test_image_is_the_one_that_the_stock_pipeline_makes(model: Family) -> None:
    """One level of 255: klora decodes outside the pipeline."""
    options = {} if model.component == "unet" else {"max_sequence_length": 512 if model.guidance_scale else 256}
    pipeline = type(model.pipe).from_pretrained(model.pipe.config._name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPT,
        width=64,
        height=128,
        num_inference_steps=4,
        guidance_scale=model.guidance_scale,
        generator=seeded(7),
        **options,
    ).images[0]
    assert np.abs(paint(model, height=128, seed=7)[0] - np.asarray(stock, dtype=int)).max() <= 1


def test_image_depends_on_its_seed_alone(model: Family) -> None:
    torch.manual_seed(1)
    first = paint(model)
    torch.manual_seed(2)
    assert np.array_equal(first, paint(model))
    assert np.abs(first - paint(model, seed=1)).mean() > 5


def test_image_of_a_batch_is_the_image_of_its_seed(model: Family) -> None:
    """One level of 255: a batch's matrix products round differently."""
    batch = paint(model, seed=5, num_outputs=3)
    for image, seed in zip(batch, (5, 6, 7), strict=True):
        assert np.abs(image - paint(model, seed=seed)[0]).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(64, 96), (112, 80)])
def test_image_has_the_size_asked_for(model: Family, width: int, height: int) -> None:
    mask = Image.new("L", (width, height), 255)
    for options in ({}, {"image": photo()}, {"image": photo(128, 40), "mask": mask}):
        options |= {"width": width, "height": height, "num_inference_steps": 2}
        assert paint(model, **options).shape == (1, height, width, 3)


@pytest.mark.parametrize(
    ("options", "steps"), [({}, [0, 1, 2, 3, 4]), ({"image": photo(), "prompt_strength": 0.5}, [2, 3, 4])]
)
def test_steps_are_told_as_places_in_the_full_schedule(
    model: Family, options: dict[str, Any], steps: list[int]
) -> None:
    told: list[int] = []
    paint(model, told.append, **options)
    assert told == steps


@pytest.mark.parametrize(
    ("scheduler", "from_noise", "from_image"),
    [(name, [0, 1, 2, 3], [2, 3]) for name in SCHEDULERS if name not in ("HeunDiscrete", "PNDM")]
    + [
        ("HeunDiscrete", [0, 0, 1, 1, 2, 2, 3], [2, 2, 3]),  # a prediction and its correction; none at the last step
        ("PNDM", [0, 0, 1, 2, 3], [1, 2, 3]),  # corrects its first step; from an image it starts there
    ],
)
def test_step_told_is_the_schedules_though_a_scheduler_calls_twice(
    sdxl: Family, scheduler: str, from_noise: list[int], from_image: list[int]
) -> None:
    told: list[list[int]] = [[], []]
    paint(sdxl, told[0].append, scheduler=scheduler)
    paint(sdxl, told[1].append, scheduler=scheduler, image=photo(), prompt_strength=0.5)
    assert told == [[*from_noise, 4], [*from_image, 4]]


def test_more_strength_goes_further_from_the_image(model: Family) -> None:
    kept = model.pipe.image_processor.postprocess(reconstruction(model, photo()))[0]
    strengths = (0.25, 0.5, 1.0)
    distances = [
        np.abs(paint(model, image=photo(), prompt_strength=s) - np.asarray(kept, int)).mean() for s in strengths
    ]
    assert distances[0] < distances[1] < distances[2]


def test_full_strength_still_depends_on_nothing_but_seed_and_prompt_in_flux(models: dict[str, Family]) -> None:
    """Rectified flow starts from pure noise at sigma 1; SDXL's last beta keeps a trace of the image."""
    model = models["flux-schnell"]
    one, other = (paint(model, image=image, prompt_strength=1.0) for image in (photo(), Image.new("RGB", (64, 64))))
    assert np.abs(one - other).max() <= 1


def test_inpainting_keeps_what_the_mask_leaves_black(model: Family) -> None:
    """The latents that reach the decoder: 1e-4 is the rounding of pixels, which the encoder amplifies."""
    mask = Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 64, axis=0).astype(np.uint8))
    with decoded_latents(model) as seen:
        paint(model, image=photo(), mask=mask, prompt_strength=1.0)
        reconstruction(model, photo())
    painted, kept = seen
    torch.testing.assert_close(painted[..., :4], kept[..., :4], rtol=0, atol=1e-4)
    assert (painted - kept)[..., 4:].abs().mean() > 1


def test_schedulers_are_those_of_the_form(sdxl: Family, models: dict[str, Family]) -> None:
    assert tuple(sdxl.schedulers) == SCHEDULERS
    assert not models["flux-dev"].schedulers


@pytest.mark.parametrize("option", [{}, {"image": photo(), "prompt_strength": 0.5}], ids=["prompt", "image"])
def test_every_scheduler_of_sdxl_gives_an_image_of_its_own(sdxl: Family, option: dict[str, Any]) -> None:
    """But DDIM and Euler: without churn they are one step, written in two ways, up to one level of rounding."""
    images, again = ({name: paint(sdxl, scheduler=name, **option) for name in SCHEDULERS} for _ in range(2))
    assert all(image.std() > 10 for image in images.values())
    assert all(np.array_equal(images[name], again[name]) for name in SCHEDULERS)
    alike = {pair for pair in combinations(SCHEDULERS, 2) if np.abs(images[pair[0]] - images[pair[1]]).max() <= 1}
    assert alike == {("DDIM", "K_EULER")}


def test_scheduler_is_k_euler_when_none_is_named(sdxl: Family) -> None:
    assert np.array_equal(paint(sdxl), paint(sdxl, scheduler="K_EULER"))


def test_solvers_of_one_equation_agree(sdxl: Family) -> None:
    """Twelve steps of a deterministic solver lie within 10 levels of K_EULER's; another seed lies 40 away."""
    euler = paint(sdxl, num_inference_steps=12, scheduler="K_EULER")
    for scheduler in ("DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "PNDM"):
        image = paint(sdxl, num_inference_steps=12, scheduler=scheduler)
        assert np.abs(image - euler).mean() < 10, scheduler


# No trace.


def state(model: Family) -> dict[str, Any]:
    """All that a request could leave behind: weights, buffers, parts, configs, hooks, the scheduler's own fields."""
    pipe = model.pipe
    modules = [pipe.vae, model.denoiser, *model.text_encoders.values()]
    scheduler = {k: v.tolist() if isinstance(v, Tensor) else repr(v) for k, v in vars(pipe.scheduler).items()}
    return {
        "parts": {name: id(part) for name, part in pipe.components.items()},
        "configs": {n: dict(p.config) for n, p in pipe.components.items() if hasattr(p, "register_to_config")},
        "pipeline": {name: id(value) for name, value in vars(pipe).items()},
        "scheduler": scheduler,
        "weights": [(name, float(x.double().sum())) for m in modules for name, x in m.state_dict().items()],
        "hooks": [len(p._forward_hooks) + len(p._forward_pre_hooks) for m in modules for p in m.modules()],
        "modes": [(p.training, type(p)) for m in modules for p in m.modules()],
    }


REQUESTS = {
    "prompt": {},
    "other size": {"width": 96, "seed": 4, "num_outputs": 2},
    "image": {"image": photo(), "prompt_strength": 0.5},
    "mask": {"image": photo(), "mask": Image.new("L", (64, 64), 255), "prompt_strength": 0.5},
    "guidance": {"guidance_scale": 1.0, "prompt": "a cat"},
}


def test_no_request_leaves_a_trace(model: Family) -> None:
    first, before = paint(model), state(model)
    for name, request in REQUESTS.items():
        paint(model, **request)
        assert state(model) == before, name
        assert np.array_equal(paint(model), first), name


def test_no_scheduler_outlives_its_request(sdxl: Family) -> None:
    first, before = paint(sdxl), state(sdxl)
    for scheduler in SCHEDULERS:
        paint(sdxl, scheduler=scheduler)
        assert state(sdxl) == before, scheduler
        assert np.array_equal(paint(sdxl), first), scheduler


def test_a_request_broken_off_leaves_no_trace(model: Family) -> None:
    """As Cog cancels: a BaseException from the middle of denoising."""

    def cancel(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    first, before = paint(model), state(model)
    with pytest.raises(KeyboardInterrupt):
        paint(model, cancel)
    assert state(model) == before
    assert np.array_equal(paint(model), first)


def test_step_is_the_schedules_not_the_count_of_forwards() -> None:
    """A pipeline may call its denoiser twice a step, once for the prompt and once for what to steer away from."""
    denoiser, steps = torch.nn.Identity(), []
    scheduler = SimpleNamespace(timesteps=[3, 2, 1], num_inference_steps=3)
    pipe = SimpleNamespace(transformer=denoiser, scheduler=scheduler, num_timesteps=2)  # an image enters at the second
    with following(pipe, steps.append) as on_step_end:
        for index in range(2):
            denoiser(torch.zeros(1))
            denoiser(torch.zeros(1))
            on_step_end(pipe, index, scheduler.timesteps[index + 1], {})
    assert steps == [1, 1, 2, 2]
