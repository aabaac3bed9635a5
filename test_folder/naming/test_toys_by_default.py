"""Where nothing is installed, the toy bases are taken, and it is said once."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import weights
from test_folder.naming.places import folder_of_bases

ROOT = Path(__file__).resolve().parents[2]
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
