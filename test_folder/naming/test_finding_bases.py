"""Names of bases become folders, and what is not installed is refused naming what is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import weights
from klora.errors import BaseModelError, RequestError
from klora.form.request import MODELS
from klora.models import FAMILIES


def base_refusal(*given: str | None) -> str:
    with pytest.raises(BaseModelError) as error:
        weights.find_base(*given)
    return str(error.value)


def test_a_base_is_found_by_its_name_whatever_family_is_asked_for(install: Callable[..., Path]) -> None:
    models = install("sdxl", "flux-dev")
    for family in (None, "sdxl", "flux"):
        assert weights.find_base("flux-dev", family) == ("flux-dev", "flux", models / "flux-dev")


@pytest.mark.parametrize(
    ("family", "found"), [("sdxl", "illustrious-xl"), ("flux", "flux-schnell"), (None, "illustrious-xl")]
)
def test_without_a_name_the_first_installed_base_of_the_family_is_found(
    install: Callable[..., Path], family: str | None, found: str
) -> None:
    install("flux-schnell", "illustrious-xl")
    assert weights.find_base(None, family).name == found


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((None, "sdxl", "illustrious-xl"), "illustrious-xl"),
        (("sdxl", "sdxl", "illustrious-xl"), "sdxl"),
        ((None, "sdxl", "flux-dev"), "sdxl"),
        ((None, "flux", "flux-schnell"), "flux-dev"),
        ((None, "sdxl", "../sdxl"), "sdxl"),
    ],
)
def test_the_base_that_is_preferred_is_found_where_it_is_meant_and_installed(
    install: Callable[..., Path], given: tuple[str | None, str, str], found: str
) -> None:
    install("sdxl", "illustrious-xl", "flux-dev")
    assert weights.find_base(*given).name == found


def test_the_table_and_not_the_disk_orders_the_bases(install: Callable[..., Path]) -> None:
    install(*reversed(MODELS))
    assert weights.installed_bases() == list(MODELS)


HOW = (
    ", as script/download-weights {} fetches it, or KLORA_MODELS set to another folder of base models; "
    "script/make-toy-bases makes toy ones in examples/toy."
)


@pytest.mark.parametrize(
    ("asked", "what", "wanted"),
    [
        (("flux-dev", None), "flux-dev", ("flux-dev",)),
        ((None, "flux"), "A base model for flux LoRAs", ("flux-dev", "flux-schnell")),
    ],
)
def test_what_is_not_installed_is_refused_naming_what_is_and_how_to_get_it(
    install: Callable[..., Path], asked: tuple[str | None, str | None], what: str, wanted: tuple[str, ...]
) -> None:
    models = install("sdxl", "illustrious-xl")
    places = " or ".join(f"{weights.BASES[name].repository} in {models}/{name}" for name in wanted)
    assert base_refusal(*asked) == (
        f"{what} is not installed: {models} has sdxl, illustrious-xl. Expected {places}{HOW.format(wanted[0])}"
    )


@pytest.mark.parametrize("ask", [lambda: weights.find_base("sdxl"), lambda: weights.training_base("sdxl")])
@pytest.mark.parametrize(("folder", "seen"), [("empty", "has no base model"), ("nowhere", "is no folder")])
def test_an_empty_and_a_missing_folder_are_told_apart_by_their_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object], folder: str, seen: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KLORA_MODELS", folder)
    with pytest.raises(BaseModelError) as error:
        ask()
    place = f"{weights.BASES['sdxl'].repository} in {tmp_path}/{folder}/sdxl"
    assert (
        str(error.value) == f"sdxl is not installed: {tmp_path}/{folder} {seen}. Expected {place}{HOW.format('sdxl')}"
    )


def test_a_server_without_any_base_is_told_where_each_could_be(install: Callable[..., Path]) -> None:
    models = install()
    with pytest.raises(BaseModelError, match=r"^A base model is not installed: ") as error:
        weights.resident_bases()
    assert all(f"{weights.BASES[name].repository} in {models}/{name}" in str(error.value) for name in MODELS)


def test_a_folder_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_MODELS", f"/{'a' * 300}")
    assert base_refusal("sdxl") == (
        f"The folder of base models is /{'a' * 300}, which cannot be read: File name too long. "
        "Expected KLORA_MODELS to name one that can."
    )


@pytest.mark.parametrize("ask", [weights.find_base, weights.training_base])
def test_a_name_that_is_no_base_is_refused(install: Callable[..., Path], ask: Callable[[str], object]) -> None:
    install("sdxl")
    with pytest.raises(BaseModelError) as error:
        ask("no-such-base")
    assert str(error.value) == f"There is no base model 'no-such-base'. Expected one of {', '.join(MODELS)}."


def test_a_folder_without_its_index_and_the_safety_checker_are_no_bases(install: Callable[..., Path]) -> None:
    models = install("safety-checker")
    (models / "sdxl").mkdir()
    assert weights.installed_bases() == []
    assert base_refusal("sdxl").startswith(f"sdxl is not installed: {models} has no base model.")
    assert base_refusal("safety-checker").startswith("There is no base model 'safety-checker'.")


def test_every_installed_base_is_resident_unless_klora_bases_names_some(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = install("sdxl", "flux-dev", "flux-schnell")
    assert [base.name for base in weights.resident_bases()] == ["sdxl", "flux-dev", "flux-schnell"]
    monkeypatch.setenv("KLORA_BASES", " flux-schnell, sdxl,flux-dev ,")
    assert weights.resident_bases() == [
        ("flux-schnell", "flux", models / "flux-schnell"),
        ("sdxl", "sdxl", models / "sdxl"),
        ("flux-dev", "flux", models / "flux-dev"),
    ]


@pytest.mark.parametrize("value", [None, ""])
def test_models_are_in_the_cache_folder_unless_klora_models_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setenv("HOME", "/nobody")
    if value is not None:
        monkeypatch.setenv("KLORA_MODELS", value)
    assert weights.models_folder() == Path("/nobody/.cache/klora/models")
    assert weights.safety_checker_path() == Path("/nobody/.cache/klora/models/safety-checker")
    monkeypatch.setenv("KLORA_MODELS", "/elsewhere")
    assert weights.models_folder() == Path("/elsewhere")


def test_a_user_without_a_home_is_told_which_settings_name_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # whom no machine knows
    for setting, folder in (("KLORA_MODELS", weights.models_folder), ("KLORA_CACHE", weights.cache_folder)):
        monkeypatch.delenv(setting, raising=False)
        with pytest.raises(
            RequestError, match=f"^There is no home folder, and {setting} is not set. Expected it to be"
        ):
            folder()
        monkeypatch.setenv(setting, "/elsewhere")
        assert folder() == Path("/elsewhere")


def test_the_table_has_every_model_of_the_form_in_its_order_and_no_unknown_family() -> None:
    assert tuple(name for name, base in weights.BASES.items() if base.family) == MODELS
    assert {base.family for base in weights.BASES.values()} == {*FAMILIES, None}
