"""A folder is loaded as the family and in the precision asked for, or refused in a sentence."""

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.errors import BaseModelError
from klora.models import FAMILIES, load_model
from klora.models.family import Family
from test_folder.families.painting import BASES, CPU, paint, photo


def test_every_family_is_tested_here() -> None:
    assert set(BASES.values()) == set(FAMILIES)


def test_loaded_denoiser_has_the_weights_in_the_folder(model: Family, bases: Path) -> None:
    folder = bases / next(base for base in BASES if (bases / base).samefile(model.pipe.config._name_or_path))
    assert type(model) is FAMILIES[BASES[folder.name]]
    stored = load_file(folder / model.component / "diffusion_pytorch_model.safetensors")
    weights = model.denoiser.state_dict()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert getattr(model.pipe, model.component) is model.denoiser


@pytest.mark.parametrize(
    ("base", "steps", "guidance_scale"), [("sdxl", 30, 7.5), ("flux-dev", 28, 3.5), ("flux-schnell", 4, 0.0)]
)
def test_base_knows_its_own_defaults(models: dict[str, Family], base: str, steps: int, guidance_scale: float) -> None:
    model = models[base]
    assert (model.steps, model.guidance_scale, model.native_size) == (steps, guidance_scale, 64)


def test_half_precision_reaches_every_part_but_sdxls_vae(bases: Path) -> None:
    for base, family in BASES.items():
        model = load_model(family, str(bases / base), CPU, torch.bfloat16)
        parts = (model.denoiser, *model.text_encoders.values())
        assert {part.dtype for part in parts} == {torch.bfloat16}
        assert model.pipe.vae.dtype == (torch.float32 if family == "sdxl" else torch.bfloat16)


@pytest.mark.parametrize("option", [{}, {"image": photo(), "prompt_strength": 0.5}], ids=["prompt", "image"])
@pytest.mark.parametrize("base", BASES)
def test_half_precision_makes_about_the_same_image(
    models: dict[str, Family], bases: Path, base: str, option: dict[str, Any]
) -> None:
    """Mean of 3 levels of 255: bfloat16 has 8 bits, and a few steps amplify its rounding; another seed is 30 away."""
    half = load_model(BASES[base], bases / base, CPU, torch.bfloat16)
    assert np.abs(paint(half, **option) - paint(models[base], **option)).mean() < 3


def test_a_base_is_loaded_beside_the_thread_that_is_interrupted(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which starts none of the libraries' threads: one that is interrupted in its place never says that it runs."""

    def load(*_: object) -> Family:
        raise OSError(f"in {get_ident()}")

    monkeypatch.setattr(FAMILIES["sdxl"], "load", load)
    with pytest.raises(BaseModelError, match=r"cannot be loaded as sdxl: in \d+$") as refusal:
        load_model("sdxl", bases / "sdxl")
    assert str(get_ident()) not in str(refusal.value)


def test_a_base_is_loaded_with_its_gpu_as_the_current_one(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the first in every new thread."""
    entered: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: entered.append(str(gpu)) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(FAMILIES["sdxl"], "load", lambda *_: 1 / 0)
    for device in ("cuda:1", "cuda", "cpu"):
        with pytest.raises(BaseModelError):
            load_model("sdxl", bases / "sdxl", torch.device(device))
    assert entered == ["cuda:1", "cuda:2", "-1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused_in_a_sentence(bases: Path, device: str) -> None:
    with pytest.raises(BaseModelError, match="cannot be loaded as sdxl: "):
        load_model("sdxl", bases / "sdxl", device)


def test_a_device_may_come_by_its_name_as_torch_has_it(bases: Path) -> None:
    assert load_model("sdxl", bases / "sdxl", "cpu", parts=()).pipe.unet.dtype == torch.float32


@pytest.mark.parametrize("family", ["video", "flux-dev"])  # which is a base
def test_a_family_that_is_none_is_refused_in_a_sentence(bases: Path, family: str) -> None:
    with pytest.raises(BaseModelError, match=rf"^There is no family '{family}'\. Expected one of sdxl, flux\.$"):
        load_model(family, bases / "flux-dev", CPU)


def test_folder_of_a_fp16_variant_is_loaded(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    shutil.copytree(bases / "sdxl", folder)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert paint(load_model("sdxl", folder, CPU)).tolist() == paint(load_model("sdxl", bases / "sdxl", CPU)).tolist()


def denoiser_file(folder: Path) -> Path:
    return (
        next(folder / c for c in ("unet", "transformer") if (folder / c).is_dir())
        / "diffusion_pytorch_model.safetensors"
    )


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def of_another_shape(file: Path) -> None:
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.ndim == 2)
    save_file(weights | {name: torch.zeros(3, 3)}, file)


def incomplete(file: Path, *more: str) -> None:
    weights = load_file(file)
    weights.pop(max(weights))
    save_file(weights | {name: torch.zeros(1) for name in more}, file)


DAMAGES = [  # what was done to the folder
    pytest.param(lambda folder: shutil.rmtree(folder), id="missing"),
    pytest.param(lambda folder: (folder / "model_index.json").unlink(), id="no model_index"),
    pytest.param(lambda folder: (folder / "model_index.json").write_text("{"), id="broken model_index"),
    pytest.param(lambda folder: cut_off(denoiser_file(folder)), id="denoiser cut off"),
    pytest.param(lambda folder: denoiser_file(folder).write_bytes(b""), id="denoiser empty"),
    pytest.param(lambda folder: denoiser_file(folder).unlink(), id="denoiser's file missing"),
    pytest.param(lambda folder: shutil.rmtree(folder / "vae"), id="no vae"),
    pytest.param(lambda folder: (folder / "vae" / "config.json").write_text("{"), id="broken config"),
    pytest.param(lambda folder: cut_off(folder / "text_encoder_2" / "model.safetensors"), id="encoder"),
    pytest.param(lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"), id="tokenizer"),
    pytest.param(lambda folder: of_another_shape(denoiser_file(folder)), id="other shape"),
    pytest.param(lambda folder: incomplete(denoiser_file(folder)), id="incomplete"),
    pytest.param(lambda folder: shutil.rmtree(folder / "tokenizer"), id="no tokenizer"),
    pytest.param(  # and with what older transformers wrote beside the parameters
        lambda folder: incomplete(folder / "text_encoder" / "model.safetensors", "text_model.embeddings.position_ids"),
        id="encoder incomplete",
    ),
    pytest.param(lambda folder: incomplete(folder / "vae" / denoiser_file(folder).name), id="vae incomplete"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("base", ["sdxl", "flux-dev"])
def test_damaged_folder_is_refused_in_a_sentence(
    bases: Path, tmp_path: Path, base: str, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / base
    shutil.copytree(bases / base, folder)
    damage(folder)
    with pytest.raises(BaseModelError, match=re.escape(str(folder))) as refusal:
        load_model(BASES[base], folder, CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("family", "base"), [("sdxl", "flux-dev"), ("flux", "sdxl"), ("sdxl", "safety-checker")])
def test_folder_of_another_family_is_refused_in_a_sentence(bases: Path, family: str, base: str) -> None:
    with pytest.raises(BaseModelError, match=re.escape(str(bases / base))):
        load_model(family, bases / base, CPU)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_load_that_is_broken_off_leaves_torch_as_it_was(
    bases: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """diffusers makes a model with its dtype as torch's default, and gives that back only when all goes well."""

    def broken(*_: Any, **__: Any) -> None:
        assert torch.get_default_dtype() == torch.bfloat16
        raise error

    monkeypatch.setattr("diffusers.models.unets.unet_2d_condition.TimestepEmbedding.__init__", broken)
    with pytest.raises(BaseModelError if error is ValueError else error):
        load_model("sdxl", bases / "sdxl", CPU, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
