"""An image is the stock pipeline's, of its seed and size, and keeps of a photo what it is to keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from klora.models.family import Family
from test_folder.families.painting import PROMPT, paint, photo, reconstruction, seeded


@contextmanager
def decoded_latents(model: Family) -> Iterator[list[Tensor]]:
    """What reaches the decoder of the VAE; every cell depends on the same cell of the latents alone."""
    seen: list[Tensor] = []
    hook = model.pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) and None)
    yield seen
    hook.remove()


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


@pytest.mark.parametrize("painted", [False, True], ids=["redrawn", "inpainted"])
def test_an_image_of_another_shape_is_cut_to_it_and_never_stretched(model: Family, painted: bool) -> None:
    """Its mask with it, which lies on the whole image whatever its own size."""
    wide, mask = photo(128, 64), Image.new("L", (128, 64))
    mask.paste(255, (40, 0, 128, 64))
    inputs = {"image": wide} | ({"mask": mask} if painted else {})
    middle = {name: picture.crop((32, 0, 96, 64)) for name, picture in inputs.items()}
    cut = paint(model, **inputs, prompt_strength=0.6)
    assert np.array_equal(cut, paint(model, **middle, prompt_strength=0.6))
    assert not np.array_equal(cut, paint(model, image=wide.resize((64, 64)), prompt_strength=0.6))
    if painted:
        narrow = mask.resize((32, 64))
        stretched = [
            paint(model, image=wide, mask=one, prompt_strength=0.6)
            for one in (narrow, narrow.resize(wide.size, Image.Resampling.BILINEAR))
        ]
        assert np.array_equal(*stretched)


def test_guidance_of_nought_is_none_and_not_the_bases_own(models: dict[str, Family]) -> None:
    for base in ("sdxl", "flux-dev"):
        own, none = (paint(models[base], num_inference_steps=2, guidance_scale=scale) for scale in (None, 0))
        assert np.abs(own - none).mean() > 1, base


def test_more_strength_goes_further_from_the_image(model: Family) -> None:
    kept = model.pipe.image_processor.postprocess(reconstruction(model, photo()))[0]
    strengths = (0.25, 0.5, 1.0)
    distances = [
        np.abs(paint(model, image=photo(), prompt_strength=s) - np.asarray(kept, int)).mean() for s in strengths
    ]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("painted", [False, True], ids=["redrawn", "inpainted"])
@pytest.mark.parametrize("strength", [0.8, 0.99])
def test_less_than_full_strength_keeps_something_of_the_image_however_few_the_steps(
    model: Family, strength: float, painted: bool
) -> None:
    """Where the mask is white, too: its first step is not the one that starts from noise alone."""
    inputs = {"mask": Image.new("L", (64, 64), 255)} if painted else {}
    inputs |= {"prompt_strength": strength, "num_inference_steps": 4}
    one, other = (paint(model, image=image, **inputs) for image in (photo(), Image.new("RGB", (64, 64))))
    assert np.abs(one - other).mean() > 2


@pytest.mark.parametrize("painted", [False, True], ids=["redrawn", "inpainted"])
@pytest.mark.parametrize("base", ["sdxl", "flux-schnell"])
def test_full_strength_depends_on_nothing_but_seed_and_prompt(
    models: dict[str, Family], base: str, painted: bool
) -> None:
    """Rectified flow starts from pure noise at sigma 1; SDXL's last beta would keep a trace of the image."""
    model = models[base]
    inputs: dict[str, Any] = {"mask": Image.new("L", (64, 64), 255)} if painted else {}
    inputs["prompt_strength"] = 1.0
    one, other = (paint(model, image=image, **inputs) for image in (photo(), Image.new("RGB", (64, 64))))
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


@pytest.mark.parametrize("zoom", [1, 3])
def test_what_a_mask_leaves_black_is_the_images_own_to_the_last_bit(model: Family, zoom: int) -> None:
    """Also where both are made smaller. What is white is all new, and a light grey a mixture."""
    mask = Image.new("L", (64, 64))
    mask.paste(153, (0, 32, 64, 48))
    mask.paste(255, (0, 48, 64, 64))
    image, mask = (each.resize((64 * zoom, 64 * zoom), Image.Resampling.NEAREST) for each in (photo(), mask))
    own = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS), dtype=int)
    options = {"image": image, "prompt_strength": 0.6, "num_outputs": 2, "num_inference_steps": 2}
    seen, sharp = (paint(model, mask=m, **options) for m in (mask, mask.point([0] * 128 + [255] * 128)))
    assert np.array_equal(seen[:, :31], [own[:31]] * 2)
    assert np.array_equal(seen[:, 49:], sharp[:, 49:]) and np.abs(sharp - own)[:, 49:].mean() > 5
    assert np.abs(seen - (0.6 * sharp + 0.4 * own))[:, 33:47].max() <= 1


def test_inpainting_repaints_the_finest_line(model: Family) -> None:
    """Of one pixel, which is at no corner of a latent cell."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 37, 64, 38))
    with decoded_latents(model) as seen:
        painted = paint(model, image=photo(), mask=mask, prompt_strength=1.0)[0]
        reconstruction(model, photo())
    assert [row for row in range(8) if (seen[0] - seen[1])[..., row, :].abs().mean() > 1] == [4]
    assert [row for row in range(64) if (painted[row] != np.asarray(photo(), int)[row]).any()] == [37]
