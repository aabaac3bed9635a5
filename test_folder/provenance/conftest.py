"""A folder to work in, with bases and LoRAs, a studio, and an image with its record."""

import shutil
from pathlib import Path

import pytest
import torch

import weights
from klora.studio import Studio
from test_folder.pairs import named_pair
from test_folder.provenance.commands import fuse


@pytest.fixture
def settings(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bases, a cache of one's own, no login; a working folder, which it is."""
    return settled_in(tmp_path, bases, monkeypatch)


def settled_in(folder: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*weights.AUTHORITIES.values(), *weights.TOKENS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("KLORA_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    return folder / "work"


@pytest.fixture(scope="module")
def studio(bases: Path) -> Studio:
    return Studio(lambda *_: ("sdxl", "sdxl", bases / "sdxl"), Path("no-checker"), torch.device("cpu"))


@pytest.fixture
def shop(settings: Path, loras: Path) -> Path:
    """A working folder with the LoRAs in it."""
    for file in loras.iterdir():
        shutil.copy(file, settings / file.name)
    return settings


@pytest.fixture(scope="module")
def original(bases: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a style LoRA."""
    with pytest.MonkeyPatch.context() as patch:
        folder = settled_in(tmp_path_factory.mktemp("original"), bases, patch)
        shutil.copy(loras / "sdxl_style.safetensors", folder)
        fuse(*named_pair("sdxl")[2:], "--output-format", "png")
        return folder / "out" / "klora_7_0.png"


@pytest.fixture
def image(shop: Path, original: Path) -> Path:
    (shop / "out").mkdir()
    return Path(shutil.copy(original, shop / "out"))
