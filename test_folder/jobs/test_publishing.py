"""Where a training is shown besides its tar: Weights & Biases, and the hub; neither can lose what was learnt."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klora.errors import RequestError
from klora.training.config import TrainConfig
from klora.training.loop import Progress
from klora.training.publishing import Publishing
from test_folder.jobs.short import held, trained, weights_of

ROOT = Path(__file__).parents[2]
WANDB = """
import json, pathlib
class Settings:
    def __init__(self, **options): self.options = options
class Run:
    def __init__(self, options): self.events = [options]
    def log(self, values, step): self.events.append([step, values])
    def finish(self, exit_code): pathlib.Path("wandb.json").write_text(json.dumps([*self.events, exit_code]))
def init(settings, **options):
    if settings.options["api_key"] == "wrong": raise RuntimeError("key wrong is unknown")
    return Run(options)
"""


def test_weights_and_biases_hears_every_report_and_the_key_goes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    tar = trained(publishing=Publishing(wandb_api_key="k3y", wandb_run="first", wandb_entity="us"))
    begun, *reports, exit_code = json.loads(Path("wandb.json").read_text())
    assert (begun["project"], begun["name"], begun["entity"]) == ("klora", "first", "us")
    assert [step for step, _ in reports] == list(range(7)) and exit_code == 0
    for (_, values), line in zip(reports, map(json.loads, tar["train.jsonl"].splitlines()), strict=True):
        told = {name: line[name] for name in ("loss", "fixed_loss", "learning_rate", "steps_per_second")}
        assert values == {name: value for name, value in told.items() if value is not None}
    assert all(b"k3y" not in data for data in tar.values())
    with pytest.raises(
        RequestError, match=r"^wandb_api_key cannot be used: key \.\.\. is unknown\. Expected"
    ) as refusal:
        trained(publishing=Publishing(wandb_api_key="wrong"))
    assert refusal.value.__cause__ is None


def test_a_tracker_that_fails_ends_no_training_and_hears_how_one_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[dict[str, Any]] = []

    def failing(*values: Any, **given: Any) -> None:
        heard.append(given)
        raise RuntimeError("k3y is not known any more")

    begun: list[dict[str, Any]] = []
    run = SimpleNamespace(log=failing, finish=failing)
    wandb = SimpleNamespace(Settings=dict, init=lambda **options: begun.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    publishing = Publishing(wandb_api_key="k3y")
    with publishing.tracked(TrainConfig()) as track:
        track(Progress(1, 2, loss=0.5))
    with pytest.raises(KeyboardInterrupt), publishing.tracked(TrainConfig()):
        raise KeyboardInterrupt
    assert begun[0]["settings"] == {"api_key": "k3y", "silent": True} and begun[0]["config"]["steps"] == 1000
    assert heard == [{"step": 1}, {"exit_code": 0}, {"exit_code": 1}]
    said = "wandb_api_key cannot be used: ... is not known any more. Expected a key of wandb.ai, or none."
    assert caplog.messages == [said] * 3


# Ctrl-C, or a cancellation, while the first training of a process loads wandb, whose parts name one another as here.
PACKAGE = """
import signal, sys, wandb.errors
if not hasattr(sys, "interrupted"):
    sys.interrupted = True
    signal.raise_signal(signal.SIGINT)
Settings, error = dict, wandb.errors.Error
def init(**options): raise error("no")
"""
INTERRUPTED = """
from klora.errors import RequestError
from klora.training.config import TrainConfig
from klora.training.publishing import Publishing
for wanted in (KeyboardInterrupt, RequestError):
    try:
        Publishing(wandb_api_key="k3y").tracked(TrainConfig()).__enter__()
    except wanted as error:
        print(error)
"""


def test_a_tracker_that_was_loading_when_a_training_was_cancelled_tracks_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "wandb" / "errors.py").write_text("class Error(Exception): ...")
    command = ["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{INTERRUPTED}"]
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "\nwandb_api_key cannot be used: no. Expected a key of wandb.ai, or none.\n", ran.stderr


def test_a_hub_out_of_reach_loses_nothing(
    quick: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    tar = trained(publishing=Publishing(hf_repo_id="me/dog", hf_token="hf_x", wandb_run="first"))
    assert b'load_lora_weights("me/dog"' in tar["README.md"]
    assert all(b"hf_x" not in data for data in tar.values())
    assert weights_of(tar) == weights_of(held(quick))
    assert any("hf_repo_id" in line and line.endswith("What was trained is in the tar.") for line in caplog.messages)
    assert "wandb_run changes nothing: wandb_api_key is ''" in caplog.messages


def test_what_is_uploaded_is_all_that_the_tar_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which push() leaves out the state of the run."""
    sent: dict[str, bytes] = {}

    def upload(folder: Path, *_: Any) -> str:
        files = [path for path in folder.rglob("*") if path.is_file()]
        sent.update({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
        return "https://huggingface.co/me/dog"

    monkeypatch.setattr("klora.training.publishing.push", upload)
    assert trained(publishing=Publishing(hf_repo_id="me/dog", hf_token="hf_x"), sample_steps=1) == sent


def test_what_is_given_without_what_would_use_it_is_said() -> None:
    given = {"hf_token": "hf_x", "hf_private": False, "wandb_project": "dogs", "wandb_run": "1", "wandb_entity": "me"}
    assert Publishing(**given).remarks == [
        "hf_token changes nothing: hf_repo_id is ''",
        "hf_private changes nothing: hf_repo_id is ''",
        "wandb_project changes nothing: wandb_api_key is ''",
        "wandb_run changes nothing: wandb_api_key is ''",
        "wandb_entity changes nothing: wandb_api_key is ''",
    ]
    assert Publishing(**given, hf_repo_id="me/dog", wandb_api_key="k3y").remarks == Publishing().remarks == []
