"""The committed toy bases and their LoRAs: stock diffusers loads them, and what they draw is what was asked for."""

import re
from functools import cache
from statistics import mean

import diffusers
import pytest
from in_venv import program

from examples.architectures import SIDES
from examples.gallery import BASES, LORAS, PAIRS, WAYS, lora_file, prompt, scores
from klora import Request, generate, load_model
from klora.models.family import Family

TOYS = LORAS.parent
PIPELINES = {"sdxl": diffusers.StableDiffusionXLPipeline, "flux-dev": diffusers.FluxPipeline}
TRAINED = [base for base in BASES if (TOYS / base / "model_index.json").is_file()]

every_base = pytest.mark.parametrize("base", TRAINED)


@every_base
def test_stock_diffusers_loads_a_toy_base(base: str) -> None:
    pipe = PIPELINES[base].from_pretrained(TOYS / base)
    side = SIDES[base]
    asked = {"height": side, "width": side, "num_inference_steps": 1}  # FLUX.1's own default is 1024, whatever the base
    image = pipe("a big red circle on a white background", **asked).images[0]
    assert image.size == (side, side)


def test_the_bases_take_at_most_40_mb_and_name_no_folder_of_a_machine() -> None:
    files = [path for base in BASES for path in (TOYS / base).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".model"}
    named = [path for path in files if path.suffix == ".json" and re.search(r'"(/|~|[A-Z]:)\w', path.read_text())]
    assert named == []


@every_base
def test_a_toy_base_draws_what_held_out_captions_ask_for(base: str) -> None:
    found = program("evaluate").accuracy(base, 8)
    assert found["ground"] >= 7 / 8
    assert found["all"] >= 7 / 8


@every_base
def test_every_subject_and_style_has_a_lora_of_at_most_3_mb_that_names_its_trigger(base: str) -> None:
    for name in {name for pair in PAIRS for name in pair}:
        file = LORAS / lora_file(base, name)
        assert file.stat().st_size <= 3e6
        assert loaded(base).read_lora(file).metadata["trigger"] in ("sbu", "szn")


# A setting at which each base shows both of this pair.
@pytest.mark.parametrize(("base", "fused"), [("sdxl", "K-LoRA s*"), ("flux-dev", "K-LoRA s, style_bias 0.85")])
def test_each_way_to_fuse_shows_what_it_should(base: str, fused: str) -> None:
    """Content alone the subject, style alone the style, and K-LoRA more of the one than style alone and more of the
    other than content alone."""
    subject, style = "robot", "blueprint"
    content, manner = (loaded(base).read_lora(LORAS / lora_file(base, name)) for name in (subject, style))
    found = {}
    for way in ("content only", "style only", fused):
        request = Request(prompt(subject), seed=0, num_outputs=2, **BASES[base], **WAYS[way])
        images = generate(loaded(base), request, content=content, style=manner)
        found[way] = {measure: mean(values) for measure, values in scores(images, subject, style).items()}
    assert found["content only"]["subject"] > 0.5 > found["content only"]["style"]
    assert found["style only"]["style"] > 0.5 > found["style only"]["subject"]
    assert found[fused]["subject"] > found["style only"]["subject"] + 0.1
    assert found[fused]["style"] > found["content only"]["style"] + 0.1


@cache
def loaded(base: str) -> Family:
    return load_model(base.split("-")[0], TOYS / base)
