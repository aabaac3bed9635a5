"""A record tells every input of the request, also those that the base or a default decided."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klora.form.request import Request
from klora.studio.provenance import UsedLoRA, read_provenance, settled
from test_folder.provenance.records import SHA256, made, saved

OTHERS = {
    "prompt": "a cat", "model": "flux-dev", "negative_prompt": "b", "content_scale": 0.5, "style_scale": -1.0,
    "fusion": "sum", "pattern": "s", "style_bias": 2.0, "alpha": 1.25, "beta": 0.1, "aspect_ratio": "16:9", "width": 80,
    "height": 96, "megapixels": "2", "prompt_strength": 0.3, "num_outputs": 3, "num_inference_steps": 9,
    "guidance_scale": 1.5, "scheduler": "PNDM", "seed": 0, "output_format": "png", "output_quality": 7,
    "add_triggers": False, "go_fast": True, "disable_safety_checker": True,
}  # fmt: skip


GIVEN: dict[str, Any] = {"content_lora": "a/b", "style_lora": "a/c", "image": Image.new("RGB", (8, 8))}
USED = {name: UsedLoRA(GIVEN[name], (SHA256,)) for name in ("content_lora", "style_lora")}


@pytest.mark.parametrize("name", OTHERS)
def test_every_input_is_told(tmp_path: Path, name: str) -> None:
    asked = Request(**{"prompt": "a dog", "seed": 7, "model": "sdxl", **GIVEN, name: OTHERS[name]})
    assert getattr(asked, name) == OTHERS[name] != getattr(Request("a dog", seed=7, model="sdxl"), name)
    told = read_provenance(saved(made(loras=USED, **GIVEN | {name: OTHERS[name]}), tmp_path, "png"))
    assert told.request(image=GIVEN["image"]) == settled(asked, str(asked.model), 3, 7.5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"fusion": "sum"}, {"content_scale", "style_scale", "prompt_strength"}),
        ({"image": None}, {"content_scale", "style_scale"}),
        ({"fusion": "content"}, {"content_scale", "prompt_strength"}),
        ({"style_lora": None}, {"content_scale", "prompt_strength"}),
    ],
)
def test_what_had_no_effect_is_not_told(given: dict[str, Any], told: set[str]) -> None:
    asked = GIVEN | {name: OTHERS[name] for name in ("content_scale", "style_scale", "prompt_strength")} | given
    used = {name: lora for name, lora in USED.items() if asked[name]}
    assert made(loras=used, **asked).inputs.keys() & {"content_scale", "style_scale", "prompt_strength"} == told


def test_what_depended_on_the_base_or_on_defaults_is_told_outright() -> None:
    pair = {"content_lora": "a/b", "style_lora": "a/c"}
    known = made(**pair).inputs
    assert (known["num_inference_steps"], known["guidance_scale"]) == (3, 7.5)
    assert (known["pattern"], known["alpha"], known["beta"]) == ("s*", 1.5, 1.275)
    assert made(**pair, pattern="s").inputs["beta"] == 0.5
    assert made(**pair, guidance_scale=0).inputs["guidance_scale"] == 0
    assert "pattern" not in made(**pair, fusion="sum").inputs


def test_the_test_of_all_inputs_names_them_all() -> None:
    apart = {"content_lora", "style_lora", "image", "mask", "report", "compare", "sweep"}  # the last: test_sheets.py
    assert {item.name for item in fields(Request)} - apart == OTHERS.keys()
