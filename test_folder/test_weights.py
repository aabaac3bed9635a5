"""Names of bases and LoRA references become paths; the environment is read when asked, and a server keeps its files."""

import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import weights
from klora.errors import BaseModelError, LoRAError
from klora.models import FAMILIES
from klora.request import MODELS

KLORA_VARIABLES = ("KLORA_MODELS", "KLORA_BASES", "KLORA_LORA_ROOT")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KLORA_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make these bases the installed ones; their folders hold no more than what says so."""
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model_index.json").write_text("{}")
        return tmp_path

    return make


def base_refusal(*given: str | None) -> str:
    with pytest.raises(BaseModelError) as error:
        weights.find_base(*given)
    return str(error.value)


# Bases.


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


def test_the_table_and_not_the_disk_orders_the_bases(install: Callable[..., Path]) -> None:
    install(*reversed(MODELS))
    assert weights.installed_bases() == list(MODELS)


@pytest.mark.parametrize("asked", [("flux-dev", None), (None, "flux"), ("no-such-base", "sdxl")])
def test_what_is_not_installed_is_refused_naming_what_is(
    install: Callable[..., Path], asked: tuple[str | None, str | None]
) -> None:
    models = install("sdxl", "illustrious-xl")
    wanted = asked[0] or asked[1]
    assert base_refusal(*asked) == (
        f"{wanted} is not installed. Installed: sdxl, illustrious-xl; KLORA_MODELS is {models}."
    )


def test_where_nothing_is_installed_the_sentence_says_none(install: Callable[..., Path]) -> None:
    models = install()
    assert base_refusal(None) == f"A base model is not installed. Installed: none; KLORA_MODELS is {models}."


def test_a_folder_without_its_index_and_the_safety_checker_are_no_bases(install: Callable[..., Path]) -> None:
    models = install("safety-checker")
    (models / "sdxl").mkdir()
    assert weights.installed_bases() == []
    assert base_refusal("safety-checker").startswith("safety-checker is not installed.")


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


def test_klora_bases_with_an_unknown_name_is_refused(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdxl")
    monkeypatch.setenv("KLORA_BASES", "sdxl,sd-1.5")
    with pytest.raises(BaseModelError, match=r"^sd-1\.5 is not installed\. Installed: sdxl;"):
        weights.resident_bases()


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


def test_the_table_has_every_model_of_the_form_in_its_order_and_no_unknown_family() -> None:
    assert tuple(name for name, base in weights.BASES.items() if base.family) == MODELS
    assert {base.family for base in weights.BASES.values()} == {*FAMILIES, None}


# LoRA references.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A LoRA folder with a file, a folder and links, beside a file that is nobody's business."""
    root = tmp_path / "loras"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "loras-else").mkdir()
    for name in ("secret.safetensors", "loras-else/secret.safetensors"):
        (tmp_path / name).touch()
    for name in ("dog.safetensors", "folder/ink.safetensors"):
        (root / name).touch()
    (root / "out").symlink_to(tmp_path)
    (root / "away.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "nowhere.safetensors").symlink_to(tmp_path / "no-such-file")
    (root / "alias.safetensors").symlink_to("dog.safetensors")
    return root


def lora_refusal(reference: str, root: Path | None) -> str:
    with pytest.raises(LoRAError) as error:
        weights.lora_path(reference, root, "style_lora")
    return str(error.value)


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        ("dog.safetensors", "dog.safetensors"),
        ("folder/ink.safetensors", "folder/ink.safetensors"),
        ("folder/../dog.safetensors", "dog.safetensors"),
        ("{root}/folder/ink.safetensors", "folder/ink.safetensors"),
        ("alias.safetensors", "dog.safetensors"),
    ],
)
def test_a_path_below_the_root_is_accepted(root: Path, reference: str, file: str) -> None:
    assert weights.lora_path(reference.format(root=root), root, "style_lora") == root / file


def test_a_root_that_is_a_link_serves_what_is_below_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert weights.lora_path("dog.safetensors", tmp_path / "link", "style_lora") == root / "dog.safetensors"


@pytest.mark.parametrize(
    "reference",
    [
        "../secret.safetensors",
        "../no-such-file.safetensors",
        "folder/../../secret.safetensors",
        "{root}/../secret.safetensors",
        "{root}-else/secret.safetensors",
        "out/secret.safetensors",
        "out/no-such-file.safetensors",
        "away.safetensors",
        "nowhere.safetensors",
        "/etc/hostname",
        "/no/such/file",
        "no-such-file.safetensors",
        "folder",
        ".",
        "",
        "/",
        "~/dog.safetensors",
        "dog.safetensors/dog.safetensors",
        "owner/model",
        "https://huggingface.co/owner/model/resolve/main/dog.safetensors",
    ],
)
def test_anything_else_is_refused_in_words_that_tell_nothing_of_the_disk(root: Path, reference: str) -> None:
    named = reference.format(root=root)
    assert lora_refusal(named, root) == (
        f"style_lora is {named!r}. Expected the path of a .safetensors file in the server's LoRA folder."
    )


@pytest.mark.parametrize(
    "reference",
    ["dog\0.safetensors", "a" * 300, "loop", "\ud800.safetensors"],
    ids=["zero byte", "too long", "loop", "no Unicode"],
)
def test_a_path_that_the_system_cannot_take_is_refused_too(root: Path, reference: str) -> None:
    (root / "loop").symlink_to(root / "loop")
    assert lora_refusal(reference, root).endswith(
        "Expected the path of a .safetensors file in the server's LoRA folder."
    )


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_root_no_path_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("KLORA_LORA_ROOT", value)
    assert weights.lora_root() is None
    for reference in (str(root / "dog.safetensors"), "/no/such/file"):
        assert lora_refusal(reference, weights.lora_root()) == (
            f"style_lora is {reference!r}, but this server takes no LoRA paths: KLORA_LORA_ROOT is not set."
        )


def test_the_root_is_the_folder_that_klora_lora_root_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_LORA_ROOT", str(root))
    assert weights.lora_root() == root


# The environment.


class Recorder(dict[str, str]):
    """An environment that knows what was asked of it."""

    def __init__(self) -> None:
        super().__init__(os.environ)
        self.asked: list[object] = []

    def __getitem__(self, name: str) -> str:
        self.asked.append(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.append(name)
        return super().__contains__(name)

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        self.asked.append(name)
        return super().get(name, default)


def test_importing_weights_reads_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(os, "environ", recorder)
    again = runpy.run_path(weights.__file__)
    assert recorder.asked == []
    again["models_folder"]()
    assert recorder.asked[0] == "KLORA_MODELS"
