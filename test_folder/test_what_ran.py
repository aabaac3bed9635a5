"""What is told of a run is about the steps that ran; a run that comes to no numbers is no image."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from klora import Request, generate, load_model
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.fusion import Schedule, fuse
from klora.generation import Draw
from klora.lora import LoRA, LowRank
from klora.models.family import Family

STEPS = 20


@pytest.fixture(scope="module")
def sdxl(bases: Path) -> Family:
    return load_model("sdxl", bases / "sdxl", torch.device("cpu"))


@pytest.fixture(scope="module")
def pair(sdxl: Family, loras: Path) -> dict[str, LoRA]:
    return {role: sdxl.read_lora(loras / f"sdxl_{role}.safetensors") for role in ("content", "style")}


def facts_of(sdxl: Family, pair: Mapping[str, LoRA], **asked: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    generate(sdxl, Request("a dog", seed=0, num_inference_steps=STEPS, **asked), record=facts.__setitem__, **pair)
    return facts


@pytest.mark.parametrize("pattern", ["s", "s*"])
@pytest.mark.parametrize(("strength", "first"), [(0.2, 16), (1.0, 0)])
def test_of_an_image_that_is_redrawn_only_the_steps_that_run_count(
    sdxl: Family, pair: Mapping[str, LoRA], pattern: Any, strength: float, first: int
) -> None:
    picture = Image.new("RGB", (64, 64), (90, 160, 30))
    facts = facts_of(sdxl, pair, image=picture, prompt_strength=strength, pattern=pattern)
    wins = fuse(**pair).content_wins(Schedule.from_pattern(pattern), STEPS)[first:]
    assert facts["style_share"] == pytest.approx(1 - wins.double().mean().item())
    assert facts["flips"] == int((wins[1:] != wins[:-1]).sum())
    assert facts["flips_per_step"] == round(facts["flips"] / len(wins), 2)


def test_the_seconds_of_each_phase_are_told_and_none_counts_twice(sdxl: Family, pair: Mapping[str, LoRA]) -> None:
    told: list[tuple[str, float]] = []
    draws = [Draw("a dog", 0), Draw("a dog " * 50, 1)]  # whose lengths make two batches
    start = time.perf_counter()
    generate(sdxl, Request("a", num_inference_steps=2), record=lambda *fact: told.append(fact), draws=draws, **pair)
    whole = time.perf_counter() - start
    laps = [(name.removesuffix("_seconds"), spent) for name, spent in told if name.endswith("_seconds")]
    assert [name for name, _ in laps] == ["fuse", "encode", *2 * ["denoise", "decode"]]
    spent = dict(laps)
    assert min(spent.values()) > 0 and sum(spent.values()) <= whole
    assert min(spent["denoise"] - laps[2][1], spent["decode"] - laps[3][1]) > 0  # both batches' together


def louder(lora: LoRA, a: float, b: float) -> LoRA:
    layers = {name: LowRank(pair.A.sign() * a, pair.B.sign() * b) for name, pair in lora.items()}
    return replace(lora, layers=layers, scores={}, _placed={})


def test_latents_that_overflow_are_refused_and_the_next_request_is_right(sdxl: Family, pair: dict[str, LoRA]) -> None:
    """The image would be black."""
    asked = Request("a dog", seed=0, num_inference_steps=2, fusion="content")
    [before] = generate(sdxl, asked, content=pair["content"])
    with pytest.raises(RequestError, match=r"latents overflowed.* Lower their scales\."):
        generate(sdxl, asked, content=louder(pair["content"], 1e3, 1e30))
    [after] = generate(sdxl, asked, content=pair["content"])
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("role", ["content", "style"])
def test_weights_whose_products_overflow_are_refused(pair: dict[str, LoRA], role: str) -> None:
    with pytest.raises(LoRAError, match="so large that they overflow"):
        fuse(**pair | {role: louder(pair[role], 1e3, 3e38)})


@pytest.mark.parametrize("given", [{"pattern": "s"}, {"style_bias": 2.0}, {"alpha": 1.0}, {"beta": 1.0}])
@pytest.mark.parametrize("roles", [(), ("content",), ("style",)])
def test_what_steers_the_choice_is_refused_where_there_is_none(
    sdxl: Family, pair: dict[str, LoRA], given: dict[str, Any], roles: tuple[str, ...]
) -> None:
    """The image would be as without it, and its record would say otherwise."""
    with pytest.raises(RequestError, match=f"^{min(given)} is .* and K-LoRA makes no choice without content_lora, sty"):
        generate(sdxl, Request("a dog", num_inference_steps=1, **given), **{role: pair[role] for role in roles})


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_negative_prompt_that_nothing_heeds_is_refused(sdxl: Family, guidance: float) -> None:
    with pytest.raises(KLoRAError, match=f"guidance_scale {guidance:g} heeds none. Raise it above 1"):
        generate(sdxl, Request("a dog", negative_prompt="a cat", guidance_scale=guidance, num_inference_steps=1))


def test_a_base_without_guidance_takes_none(bases: Path) -> None:
    """0 says so, as the records of its images do."""
    schnell = load_model("flux", bases / "flux-schnell", torch.device("cpu"))
    for guidance in (0.5, 1.0):
        with pytest.raises(
            RequestError, match=rf"^guidance_scale is {guidance:g}, but this FLUX\.1 takes none\. Leave "
        ):
            generate(schnell, Request("a dog", guidance_scale=guidance, num_inference_steps=1, width=64, height=64))
    assert generate(schnell, Request("a dog", guidance_scale=0.0, num_inference_steps=1, width=64, height=64))


def test_a_strength_that_leaves_no_step_is_refused(sdxl: Family) -> None:
    asked = Request("a dog", image=Image.new("RGB", (64, 64)), prompt_strength=0.19, num_inference_steps=5)
    with pytest.raises(RequestError, match=r"^prompt_strength 0\.19 of 5 steps is no step\. Raise either\.$"):
        generate(sdxl, asked)
