"""LoRAs choose the base where the request does not; one that does not fit is refused, naming the input."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import weights
from klora.cache import Borrowed
from klora.errors import BaseModelError, LoRAError
from klora.studio import Studio
from test_folder import tiny
from test_folder.pairs import pair_of
from test_folder.studio.opening import OTHER, open_studio, request
from test_folder.tiny import BASES

NAMES = {"sdxl": "SDXL", "flux": "FLUX.1"}


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("roles", [("content_lora",), ("style_lora",), ("content_lora", "style_lora")])
def test_without_a_model_the_loras_choose_the_base(
    studio: Studio, loras: Path, family: str, roles: tuple[str, ...]
) -> None:
    studio.load(*weights.find_base(BASES[OTHER[family]]))
    studio.make(request(), {role: pair_of(loras, family)[role] for role in roles})
    assert studio.resident[-1] == BASES[family]


@pytest.mark.parametrize(
    ("model", "named", "taken"),
    [
        (None, ("illustrious-xl", None), "illustrious-xl"),
        (None, (None, "illustrious-xl"), "illustrious-xl"),
        (None, ("sdxl", "illustrious-xl"), "sdxl"),
        ("sdxl", ("illustrious-xl", "illustrious-xl"), "sdxl"),
        (None, ("a base of others", None), "sdxl"),
    ],
)
def test_a_lora_that_names_the_base_of_its_training_chooses_that(
    fresh: Studio, loras: Path, tmp_path: Path, model: str | None, named: tuple[str | None, ...], taken: str
) -> None:
    files = {}
    for (role, file), base in zip(pair_of(loras).items(), named, strict=True):
        files[role] = Borrowed(tmp_path / file.path.name)
        save_file(load_file(file.path), files[role].path, {"base": base} if base else None)
    fresh.make(request(model=model), files)
    assert fresh.resident == [taken]


@pytest.mark.parametrize(
    ("family", "header", "pages", "taken"),
    [
        ("sdxl", None, ("illustrious-xl", ""), "illustrious-xl"),
        ("sdxl", None, ("", "illustrious-xl"), "illustrious-xl"),
        ("sdxl", None, ("sdxl", "illustrious-xl"), "sdxl"),
        ("sdxl", "illustrious-xl", ("sdxl", "sdxl"), "illustrious-xl"),
        ("flux", None, ("flux-schnell", ""), "flux-schnell"),
        ("sdxl", None, ("flux-schnell", ""), "sdxl"),  # a page that errs
    ],
)
def test_a_page_that_names_the_base_chooses_that_where_the_header_names_none(
    fresh: Studio, loras: Path, tmp_path: Path, family: str, header: str | None, pages: tuple[str, str], taken: str
) -> None:
    files = {}
    for (role, file), page in zip(pair_of(loras, family, scores=tmp_path).items(), pages, strict=True):
        files[role] = file._replace(path=tmp_path / file.path.name, base=page)
        save_file(load_file(file.path), files[role].path, {"base": header} if header else None)
    fresh.make(request(), files)
    assert fresh.resident == [taken]


def test_without_model_and_loras_the_first_installed_base_is_taken(fresh: Studio) -> None:
    fresh.make(request(), {})
    assert fresh.resident == ["sdxl"]


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("role", ["content_lora", "style_lora"])
def test_a_lora_of_the_other_family_is_refused_naming_the_input_and_both_families(
    fresh: Studio, loras: Path, family: str, role: str
) -> None:
    with pytest.raises(LoRAError) as error:
        fresh.make(request(model=BASES[family]), {role: pair_of(loras, OTHER[family])[role]})
    assert str(error.value) == (
        f"{role} was made for {NAMES[OTHER[family]]}, but this request runs {BASES[family]}. "
        f"Expected one for {NAMES[family]}."
    )
    assert fresh.resident == []


@pytest.mark.parametrize("family", BASES)
def test_two_loras_of_different_families_are_refused(fresh: Studio, loras: Path, family: str) -> None:
    files = {
        "content_lora": pair_of(loras, family)["content_lora"],
        "style_lora": pair_of(loras, OTHER[family])["style_lora"],
    }
    with pytest.raises(LoRAError) as error:
        fresh.make(request(), files)
    assert str(error.value) == (
        f"style_lora was made for {NAMES[OTHER[family]]}, but this request runs {BASES[family]}. "
        f"Expected one for {NAMES[family]}."
    )


def test_a_family_without_an_installed_base_is_refused(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdxl").symlink_to(bases / "sdxl")
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"^A base model for flux LoRAs is not installed: \S+ has sdxl\. "):
        open_studio(tmp_path).make(request(), pair_of(loras, "flux"))


def test_a_lora_that_does_not_fit_the_base_is_refused_naming_the_input(
    studio: Studio, loras: Path, tmp_path: Path
) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = tiny.save_lora(tmp_path / "wide.safetensors", tiny.random_lora({name: (48, 48)}, seed=0))
    with pytest.raises(LoRAError, match=r"^style_lora: wide\.safetensors was made for another base: "):
        studio.make(request(), pair_of(loras) | {"style_lora": Borrowed(wide)})


def test_a_file_that_is_no_lora_is_refused_naming_the_input(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("no tensors here")
    with pytest.raises(LoRAError, match=r"style_lora.*notes\.safetensors"):
        studio.make(request(), {"style_lora": Borrowed(tmp_path / "notes.safetensors")})
