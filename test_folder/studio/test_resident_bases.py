"""Bases stay in memory while there is room, the one used least recently leaves, and a damaged one changes nothing."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import weights
from klora.errors import BaseModelError, RequestError
from klora.layers import HEADROOM_BYTES
from klora.lora import LoRA
from klora.studio import Studio
from test_folder.pairs import pair_of
from test_folder.studio.damaging import cut, lacking, without
from test_folder.studio.opening import OTHER, PLENTY, Images, made, open_studio, request, same
from test_folder.tiny import BASES


def room_for(count: int, checker: Path) -> Studio:
    """A studio whose accelerator is full as soon as it holds so many bases."""
    studio = open_studio(checker, lambda device: PLENTY if len(studio.resident) < count else HEADROOM_BYTES)
    return studio


def test_the_base_used_least_recently_leaves_when_memory_is_short(models: Path) -> None:
    studio = room_for(2, models / "safety-checker")
    for name, expected in (
        ("sdxl", ["sdxl"]),
        ("flux-dev", ["sdxl", "flux-dev"]),
        ("sdxl", ["flux-dev", "sdxl"]),
        ("illustrious-xl", ["sdxl", "illustrious-xl"]),
        ("flux-schnell", ["illustrious-xl", "flux-schnell"]),
    ):
        studio.load(*weights.find_base(name))
        assert studio.resident == expected


@pytest.mark.parametrize(
    ("inputs", "refusal"),
    [
        ({"width": 72}, r"^width is 72\. Expected a multiple of 16 on FLUX\.1\.$"),
        ({"width": 64, "height": 72}, r"^height is 72\. Expected a multiple of 16 on FLUX\.1\.$"),
        ({"image": Image.new("RGB", (401, 100))}, r"^image is 401x100\. "),
        ({"negative_prompt": "rain"}, r"^negative_prompt is given, but FLUX\.1 takes none\. "),
        ({"scheduler": "DDIM"}, r"^scheduler is DDIM, but FLUX\.1 has its own\. "),
    ],
)
def test_no_base_is_loaded_for_what_its_family_cannot_do(models: Path, inputs: dict[str, Any], refusal: str) -> None:
    studio = room_for(1, models / "safety-checker")
    studio.load(*weights.find_base("sdxl"))
    with pytest.raises(RequestError, match=refusal):
        studio.make(request(model="flux-dev", **inputs), {})
    assert studio.resident == ["sdxl"]


def test_a_base_that_leaves_is_gone_from_memory(models: Path) -> None:
    studio = room_for(1, models / "safety-checker")
    denoiser = weakref.ref(studio.load(*weights.find_base("sdxl")).denoiser)
    studio.make(request(model="sdxl"), {})
    assert denoiser() is not None
    studio.load(*weights.find_base("flux-dev"))
    assert denoiser() is None


def test_a_base_whose_load_is_broken_off_at_its_end_is_loaded_again(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = room_for(1, models / "safety-checker")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("klora.studio.bases.plain_encoder", interrupted)
        studio.make(request(model="sdxl"), {})
    assert studio.resident == []
    assert len(made(studio, request(model="sdxl"), {})) == 1


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_loras_of_earlier_requests_leave_before_any_base(models: Path, loras: Path) -> None:
    """As much memory as there is, they would not be missed there: a base takes longer to read."""
    kept: list[weakref.ref[LoRA]] = []
    studio = open_studio(models, lambda device: 0 if any(lora() for lora in kept) else PLENTY)
    studio.make(request(), pair_of(loras, "sdxl"))
    kept += map(weakref.ref, studio._shelf._loras.values())
    assert len(kept) == 2 and all(lora() for lora in kept)
    studio.load(*weights.find_base("flux-dev"))
    assert studio.resident == ["sdxl", "flux-dev"] and not any(lora() for lora in kept)


@pytest.mark.parametrize("family", BASES)
def test_a_base_that_left_comes_back_on_demand_and_draws_the_same(models: Path, family: str) -> None:
    studio, base, other = room_for(1, models / "safety-checker"), BASES[family], BASES[OTHER[family]]
    before = made(studio, request(model=base), {})
    studio.make(request(model=other), {})
    assert studio.resident == [other]
    assert same(made(studio, request(model=base), {}), before)
    assert studio.resident == [base]


@pytest.mark.parametrize(("missing", "resident"), [(0, ["sdxl", "flux-dev"]), (1, ["flux-dev"])])
def test_a_base_leaves_when_one_byte_is_missing_for_the_next(models: Path, missing: int, resident: list[str]) -> None:
    needed = sum(file.stat().st_size for file in (models / "flux-dev").glob("*/*.safetensors"))
    studio = open_studio(models, lambda device: needed + HEADROOM_BYTES - missing)
    for name in ("sdxl", "flux-dev"):
        studio.load(*weights.find_base(name))
    assert studio.resident == resident


@pytest.mark.parametrize(("missing", "resident"), [(0, ["flux-dev", "both"]), (1, ["both"])])
def test_of_two_variants_only_the_one_that_is_loaded_counts(
    models: Path, tmp_path: Path, missing: int, resident: list[str]
) -> None:
    both = Path(shutil.copytree(models / "sdxl", tmp_path / "both"))
    files = list(both.glob("*/*.safetensors"))
    for file in files:
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    needed = sum(file.stat().st_size for file in files)
    studio = open_studio(models, lambda device: needed + HEADROOM_BYTES - missing)
    studio.load(*weights.find_base("flux-dev"))
    studio.load("both", "sdxl", both)
    assert studio.resident == resident


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("unet"), id="no unet"),
        pytest.param(cut(UNET), id="unet cut short"),
        pytest.param(lambda base: (base / "model_index.json").write_text("{"), id="no index"),
        pytest.param(cut(TEXT), id="text encoder cut short"),
        pytest.param(lacking(UNET), id="unet lacks a tensor"),
        pytest.param(without("tokenizer"), id="no tokenizer"),
        pytest.param(lacking(TEXT), id="text encoder lacks a tensor"),
    ],
)
def test_a_damaged_base_is_refused_and_the_others_stay(
    studio: Studio,
    first: dict[str, Images],
    models: Path,
    loras: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
) -> None:
    resident = studio.resident
    damage(damaged := Path(shutil.copytree(models / "sdxl", tmp_path / "damaged")))
    with pytest.raises(BaseModelError, match=r"/damaged "):
        studio.load(str(tmp_path), "sdxl", damaged)
    assert studio.resident == resident
    assert same(made(studio, request(), pair_of(loras, "sdxl")), first["sdxl"])


def test_weights_that_are_a_link_to_nothing_are_refused(fresh: Studio, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / UNET).symlink_to("nowhere")
    with pytest.raises(BaseModelError, match=r" is no diffusers-format folder: it has no model_index\.json\.$"):
        fresh.load("sdxl", "sdxl", tmp_path)
