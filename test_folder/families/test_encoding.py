"""Images and prompts are encoded as diffusers does."""

import numpy as np
import torch

from klora.form.request import Request
from klora.models.family import Family
from test_folder.families.painting import PROMPT, photo, pixels_of, reconstruction


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
