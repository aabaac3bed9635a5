"""SDXL's schedulers are those of the form, each with an image of its own, near to what the others make."""

from itertools import combinations
from typing import Any

import diffusers
import numpy as np
import pytest

from klora.form.request import SCHEDULERS
from klora.models.family import Family
from test_folder.families.painting import PROMPT, paint, photo, pixels_of, seeded

STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "DPMSolverMultistep": (diffusers.DPMSolverMultistepScheduler, {}),
    "HeunDiscrete": (diffusers.HeunDiscreteScheduler, {}),
    "KarrasDPM": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "K_EULER_ANCESTRAL": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "K_EULER": (diffusers.EulerDiscreteScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}
"""What the names of the form are in diffusers."""


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


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_is_redrawn_as_the_stock_pipeline_with_this_scheduler_does(sdxl: Family, scheduler: str) -> None:
    """From the same latents, which the stock pipeline would else draw by the seed. One level of 255, for rounding."""
    kind, options = STOCK[scheduler]
    parts = sdxl.pipe.components | {"scheduler": kind.from_config(sdxl.pipe.scheduler.config, **options)}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0}
    latents = sdxl.encode_images(pixels_of(photo())).mean
    stock = pipeline(PROMPT, image=latents, strength=0.6, generator=seeded(7), **asked).images[0]
    image = paint(sdxl, scheduler=scheduler, image=photo(), prompt_strength=0.6, seed=7, **asked)[0]
    assert np.abs(image - np.asarray(stock, dtype=int)).max() <= 1
