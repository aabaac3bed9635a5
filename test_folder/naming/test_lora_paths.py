"""A LoRA's path leads to a file below the root, or is refused in words that tell nothing of the disk."""

from pathlib import Path

import pytest

import weights
from klora.errors import LoRAError, SourceError
from klora.sources.kinds import Local
from klora.sources.local import lora_path, pinned

ELSEWHERE = "a reference such as hf:owner/name/file.safetensors or an https address"


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
        lora_path(reference, root, "style_lora")
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
    assert lora_path(reference.format(root=root), root, "style_lora") == root / file


def test_a_root_that_is_a_link_serves_what_is_below_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert lora_path("dog.safetensors", tmp_path / "link", "style_lora") == root / "dog.safetensors"


def test_a_pinned_file_that_cannot_be_read_is_refused_without_its_folder(root: Path) -> None:
    with pytest.raises(SourceError, match=r"^style_lora: folder cannot be read: Is a directory\. Expected"):
        pinned(root / "folder", Local("folder", pin="0" * 64), "style_lora")


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
        f"style_lora is {named!r}. "
        f"Expected the path of a .safetensors file in the server's LoRA folder, or {ELSEWHERE}."
    )


@pytest.mark.parametrize(
    "reference",
    ["dog\0.safetensors", "a" * 300, "loop", "\ud800.safetensors"],
    ids=["zero byte", "too long", "loop", "no Unicode"],
)
def test_a_path_that_the_system_cannot_take_is_refused_too(root: Path, reference: str) -> None:
    (root / "loop").symlink_to(root / "loop")
    assert lora_refusal(reference, root).endswith(
        f"Expected the path of a .safetensors file in the server's LoRA folder, or {ELSEWHERE}."
    )


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_root_no_path_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("KLORA_LORA_ROOT", value)
    assert weights.lora_root() is None
    for reference in (str(root / "dog.safetensors"), "/no/such/file"):
        assert lora_refusal(reference, weights.lora_root()) == (
            f"style_lora is {reference!r}, but this server takes no LoRA paths: KLORA_LORA_ROOT is not set. "
            f"Expected {ELSEWHERE}."
        )


def test_the_root_is_the_folder_that_klora_lora_root_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_LORA_ROOT", str(root))
    assert weights.lora_root() == root
