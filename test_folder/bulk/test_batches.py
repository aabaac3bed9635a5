"""Different prompts in one batch are the images that they would be alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klora.form.request import Request
from klora.generation import Draw as One
from klora.generation import generate
from klora.models import load_model
from klora.models.family import Family
from test_folder.bulk.prompting import CPU, ONE_LEVEL, PROMPTS, far
from test_folder.variants import embeddings


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    return {family: load_model(family, bases / base, CPU) for family, base in (("sdxl", "sdxl"), ("flux", "flux-dev"))}


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
HALF = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 64, axis=0).repeat(32, axis=1))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("sdxl", {}),
    "flux": ("flux", {}),
    "negative prompt, noise in each step": ("sdxl", {"negative_prompt": "blurry", "scheduler": "K_EULER_ANCESTRAL"}),
    "image": ("sdxl", {"image": PICTURE, "prompt_strength": 0.7}),
    "mask": ("flux", {"image": PICTURE, "mask": HALF}),
}
DRAWS = [One(prompt, seed) for prompt, seed in zip(PROMPTS, (7, 3, (1 << 32) - 1), strict=True)]


def compared(model: Family, asked: Request, draws: Sequence[One] = DRAWS, **loras: Any) -> None:
    """Together and alone."""
    together = generate(model, asked, draws=draws, **loras)
    alone = [generate(model, replace(asked, prompt=one.prompt, seed=one.seed), **loras)[0] for one in draws]
    assert [far(*pair) <= ONE_LEVEL for pair in zip(together, alone, strict=True)] == [True, True, True]
    assert min(far(alone[0], alone[1]), far(alone[1], alone[2])) > 5 * ONE_LEVEL


@pytest.mark.parametrize("kind", KINDS)
def test_three_prompts_in_a_batch_are_the_three_images(models: dict[str, Family], loras: Path, kind: str) -> None:
    family, given = KINDS[kind]
    model = models[family]
    pair = {role: model.read_lora(loras / f"{family}_{role}.safetensors") for role in ("content", "style")}
    compared(model, Request("unused", num_inference_steps=3, **given), **pair)


def test_one_that_is_read_in_two_pieces_leaves_the_others_as_they_are(models: dict[str, Family], loras: Path) -> None:
    model, (first, second, third) = models["sdxl"], DRAWS
    content, style = (model.read_lora(loras / f"sdxl_{role}.safetensors") for role in ("content", "style"))
    asked, flips = Request("unused", num_inference_steps=3, negative_prompt="rain"), set[int]()
    draws = [first, second._replace(prompt=f"{second.prompt} {'and a cat ' * 30}"), third]
    compared(model, asked, draws, content=content, style=style)
    for these in (draws, DRAWS):
        facts = dict[str, Any]()
        generate(model, asked, draws=these, content=content, style=style, record=facts.__setitem__)
        flips.add(facts["flips"])
    assert len(flips) == 1 and min(flips) > 0


def test_a_word_that_a_lora_teaches_is_read_in_each_prompt(models: dict[str, Family], loras: Path) -> None:
    model = models["sdxl"]
    vectors = {name: 50 * vector for name, vector in embeddings(model, "text_encoder", "text_encoder_2").items()}
    content = replace(model.read_lora(loras / "sdxl_content.safetensors"), words={"dog": vectors, "cats": vectors})
    asked = Request("unused", num_inference_steps=2)
    compared(model, asked, content=content)
    taught, untaught = (
        generate(model, asked, content=lora, draws=DRAWS) for lora in (content, replace(content, words={}))
    )
    assert [far(*pair) > 5 * ONE_LEVEL for pair in zip(taught, untaught, strict=True)] == [True, False, True]
