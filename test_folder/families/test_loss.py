"""The loss that training makes of a prediction is the textbook's, and its gradient is its slope."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klora.lora import LowRank
from klora.models import load_model
from klora.models.family import Conditioning, Family
from klora.training.objective import draw_noise, draw_times, errors
from klora.training.trainable import trainable
from test_folder import tiny
from test_folder.families.painting import BASES, CPU, PROMPT, seeded


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
    with trainable(model.denoiser, lora):
        return loss(model, *batch, seeded(1)).mean()
