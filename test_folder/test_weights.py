"""Names of bases and LoRA references become paths; the environment is read when asked, and a server keeps its files."""

import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weights
from klora.errors import BaseModelError, LoRAError
from klora.form.request import MODELS
from klora.models import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
KLORA_VARIABLES = ("KLORA_MODELS", "KLORA_BASES", "KLORA_LORA_ROOT")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KLORA_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back as it was, even where it was unset
        monkeypatch.delenv(name)


def folder_of_bases(folder: Path, *names: str) -> Path:
    """A folder with these bases, which hold no more than what says that they are there."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make these bases the installed ones."""
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))
    return lambda *names: folder_of_bases(tmp_path, *names)


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


def test_klora_bases_with_an_unknown_name_is_refused(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sdxl")
    monkeypatch.setenv("KLORA_BASES", "sdxl,sd-1.5")
    with pytest.raises(BaseModelError, match=r"^There is no base model 'sd-1\.5'\. Expected one of sdxl, "):
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


# Toys.

TOLD = (
    "No base models in ~/.cache/klora/models: using the toy ones in examples/toy (pictures of shapes). "
    "Set KLORA_MODELS for real ones."
)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of toy bases, and a home without any."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder_of_bases(tmp_path / "toy", "sdxl", "flux-dev")


def test_without_bases_the_toys_and_their_loras_are_taken_and_it_is_said_once(
    toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        weights.use_toys_if_no_bases(toys)
    assert weights.find_base(None, "flux") == ("flux-dev", "flux", toys / "flux-dev")
    assert weights.lora_root() == toys / "loras"
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, TOLD)]


def test_a_lora_folder_of_ones_own_stays_with_the_toys(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_LORA_ROOT", "/mine")
    weights.use_toys_if_no_bases(toys)
    assert (weights.models_folder(), weights.lora_root()) == (toys, Path("/mine"))


@pytest.mark.parametrize("case", ["KLORA_MODELS is set", "a base is installed", "no toys are there"])
def test_otherwise_nothing_is_chosen_nor_said(
    toys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    if case == "KLORA_MODELS is set":
        monkeypatch.setenv("KLORA_MODELS", "/nowhere")
    elif case == "a base is installed":
        folder_of_bases(weights.models_folder(), "flux-schnell")
    else:
        shutil.rmtree(toys)
    before = dict(os.environ)
    weights.use_toys_if_no_bases(toys)
    assert (dict(os.environ), caplog.records) == (before, [])


def test_the_toys_are_beside_the_programs() -> None:
    assert ROOT / "examples" / "toy" == weights.TOYS


# What script/serve needs of the repository, and in cog's place a server that says what it is given and ends.
SERVED = ("predict.py", "train.py", "cog.yaml", "weights.py", "script/serve", "script/schema", "script/in_venv.py")
ECHO = "import os, sys\nprint(sys.argv[1:], os.environ['KLORA_MODELS'], os.environ['KLORA_LORA_ROOT'])"


@pytest.mark.parametrize("mode", ["predict", "train"])
def test_script_serve_hands_the_toys_to_its_server(toys: Path, tmp_path: Path, mode: str) -> None:
    for name in SERVED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "script" / "setup").symlink_to(shutil.which("true"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "cog" / "server").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("server/__init__.py", ""), ("server/http.py", ECHO)):
        (tmp_path / "cog" / name).write_text(text)
    (tmp_path / "examples").mkdir()
    (seen := tmp_path / "examples" / "toy").symlink_to(toys)
    command = [sys.executable, tmp_path / "script" / "serve", *(["--train"] if mode == "train" else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    options = ["--host", "127.0.0.1", *(["--x-mode", "train"] if mode == "train" else [])]
    *said, given, last = result.stderr.splitlines()
    assert said.count(TOLD) == 1
    assert given == f"{options} {seen} {seen / 'loras'}"
    assert (result.returncode, last) == (1, "The server ended with status 0.")


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
