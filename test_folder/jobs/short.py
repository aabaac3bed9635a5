"""Short trainings of the tiny bases, by the library and by the `klora` command, and what their tars hold."""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load
from typer.testing import CliRunner, Result

import weights
from klora import cli
from klora.training.job import TrainingBase, run_training
from test_folder.trainer.material import SETTINGS


def entered(folder: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(folder)
    Path("pictures").mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 64), colour).save(f"pictures/{colour}.png")
        Path(f"pictures/{colour}.txt").write_text(f"a {colour} [trigger] toy")


def trained(out: str = "lora.tar", upload: str = "pictures", **given: Any) -> dict[str, bytes]:
    """What the tar of a training of tiny SDXL holds. What is handed in cannot be changed."""
    resume = given.pop("resume_from", None)
    base = TrainingBase(**weights.training_base(given.pop("base", "sdxl")))
    options = {name: given.pop(name) for name in ("publishing", "on_progress") if name in given}
    config = MappingProxyType(SETTINGS | given)
    return held(run_training(base, Path(upload), config, Path(out), resume_from=resume, **options))


def held(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def weights_of(tar: Mapping[str, bytes], name: str = "lora.safetensors") -> dict[str, bytes]:
    """By key; safetensors' header is not the same from one writing to the next."""
    return {key: tensor.numpy().tobytes() for key, tensor in load(tar[name]).items()}


def klora_train(*arguments: str, upload: str = "pictures") -> Result:
    named = {name.replace("_", "-"): value for name, value in SETTINGS.items()}
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return CliRunner().invoke(cli.app, ["train", upload, *options, *arguments])
