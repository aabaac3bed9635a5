"""A request becomes the images that generate makes, at its LoRAs' scales, each prompt read once and each step told."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weights
from klora.cache import Borrowed
from klora.fusion import fuse
from klora.generation import generate
from klora.models import linears
from klora.studio import Studio
from test_folder.pairs import pair_of
from test_folder.studio.opening import Images, made, request, same
from test_folder.tiny import BASES


@pytest.mark.parametrize("base", ["sdxl", "illustrious-xl", "flux-dev", "flux-schnell"])
def test_every_base_makes_the_images_that_generate_makes(studio: Studio, loras: Path, base: str) -> None:
    files, asked = pair_of(loras, weights.BASES[base].family), request(model=base, num_outputs=2)
    model = studio.load(*weights.find_base(base))
    content, style = (model.read_lora(file.path) for file in files.values())
    expected = generate(model, asked, content=content, style=style)
    assert same(made(studio, asked, files), {index: np.asarray(image) for index, image in enumerate(expected)})
    assert not same(made(studio, asked, {}), made(studio, asked, files))


def test_the_log_names_each_lora_and_what_changes_nothing(
    studio: Studio, loras: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "klora.studio.studio")
    made(studio, request(style_scale=2), {"content_lora": Borrowed(loras / "sdxl_content.safetensors")})
    lora, idle = caplog.messages
    assert lora.startswith("content_lora: diffusers: ") and idle == "style_scale changes nothing: no style LoRA acts"


def test_layers_of_a_text_encoder_act_at_their_loras_scale(studio: Studio, loras: Path) -> None:
    def draw(scale: float | None = None, **given: Any) -> Images:
        files = {} if scale is None else {"style_lora": Borrowed(loras / "encoder.safetensors")}
        return made(studio, request(model="sdxl", style_scale=scale or 0.0, **given), files)

    assert not same(draw(1.0), draw())
    assert not same(draw(1.0), draw(2.0))
    for negative in ("", "rain"):
        assert same(draw(0.0, negative_prompt=negative), draw(negative_prompt=negative))


def test_a_pair_without_layers_of_the_denoiser_has_no_style_share(studio: Studio, loras: Path) -> None:
    files = dict.fromkeys(("content_lora", "style_lora"), Borrowed(loras / "encoder.safetensors"))
    asked, facts = request(model="sdxl"), dict[str, Any]()
    (image,) = studio.make(asked, files, facts.__setitem__).values()
    record = image.info["provenance"].record()
    assert json.loads(record, parse_constant=pytest.fail)["measured"] == {"gamma": facts["gamma"]}
    assert "style_share" not in facts and studio.report(asked, files).style_share is None
    assert list(studio.make(replace(asked, **dict.fromkeys(files, "x"), sweep=True), files)) == ["sweep"]


def test_a_prompt_is_read_once_unless_a_lora_has_a_say_in_it(fresh: Studio, loras: Path) -> None:
    encoder, passes = fresh.load(*weights.find_base("sdxl")).text_encoders["text_encoder"], [0]
    encoder.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def passes_of(files: Mapping[str, Borrowed], **given: Any) -> int:
        passes[0] = 0
        made(fresh, request(model="sdxl", **given), files)
        return passes[0]

    plain = {"content_lora": Borrowed(loras / "sdxl_content.safetensors")}
    assert passes_of(plain, negative_prompt="rain") == 2
    assert passes_of({}, negative_prompt="rain", seed=8) == passes_of(plain, negative_prompt="rain") == 0
    assert passes_of(plain, negative_prompt="snow") == 2
    assert passes_of(plain, negative_prompt="rain") == 0
    assert passes_of(plain, prompt="a photo of a cat", negative_prompt="rain") == 2
    assert passes_of(plain) == 1
    assert passes_of(plain | {"style_lora": Borrowed(loras / "encoder.safetensors")}, negative_prompt="rain") == 2


@pytest.mark.parametrize("family", BASES)
def test_loras_of_a_loaded_base_wait_for_nothing_that_is_known(
    fresh: Studio, loras: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4. The order of the layers is there after set-up, and the second request opens no file of a LoRA, a tar would
    be unpacked for it, nor of its scores, scores nothing and looks up no version."""
    linears._execution_order.cache_clear()
    fresh.prepare([weights.find_base(BASES[family])])
    monkeypatch.setattr(linears, "linear_shapes", None)  # nobody needs it from now on
    files = pair_of(loras, family, scores=tmp_path)
    before = made(fresh, request(), files)
    assert all(file.scores.exists() for file in files.values())
    for name in ("files.container.safe_open", "files.container.tarfile", "files.shelf.json", "fusion.importance"):
        monkeypatch.setattr(f"klora.{name}", None)
    monkeypatch.setattr("klora.studio.provenance.version", None)
    assert not same(before, made(fresh, request(content_scale=0.5), files))
    assert same(before, made(fresh, request(), files))


def test_the_scores_that_are_kept_for_the_next_time_are_each_loras_own(
    studio: Studio, loras: Path, tmp_path: Path
) -> None:
    files = pair_of(loras, scores=tmp_path)
    made(studio, request(), files)
    model = studio.load(*weights.find_base("sdxl"))
    read = {name: model.read_lora(file.path) for name, file in files.items()}
    fuse(*read.values())
    for name, file in files.items():
        assert file.scores
        kept = json.loads(file.scores.read_text())["scores"]
        own = {layer: {str(k): total for k, total in sums.items()} for layer, sums in read[name].scores.items()}
        assert kept == own


@pytest.mark.parametrize("fusion", ["klora", "sum", "content", "style"])
def test_whole_numbers_serve_as_scales(studio: Studio, loras: Path, fusion: str) -> None:
    files = pair_of(loras, "sdxl")
    facts: dict[str, Any] = {}
    whole = made(studio, request(fusion=fusion, content_scale=1, style_scale=2), files, record=facts.__setitem__)
    assert ("fusion" in facts) == (fusion == "klora")  # no choice is summed up where none is made
    assert same(whole, made(studio, request(fusion=fusion, content_scale=1.0, style_scale=2.0), files))


@pytest.mark.parametrize("family", BASES)
def test_progress_is_told_step_by_step(studio: Studio, loras: Path, family: str) -> None:
    told: list[tuple[int, int]] = []
    studio.make(request(), pair_of(loras, family), on_step=lambda *step: told.append(step))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
