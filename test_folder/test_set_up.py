"""Set-up fetches the bases that it is to have, from a hub on 127.0.0.1, says what it cannot have, and stays offline."""

import gc
import logging
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import weights
from klora.bases.install import setup_note
from klora.errors import BaseModelError, SafetyError
from klora.studio import Studio
from predict import Predictor
from test_folder.fakes.base_hub import FILES, TOKEN, Hub, Server, contents, serving

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [weights.BASES[name] for name in ("sdxl", "flux-dev", "flux-schnell")]
GATED = (
    "flux-dev is gated: accept the licence at huggingface.co/black-forest-labs/FLUX.1-dev and set HF_TOKEN to a token "
    "of the account that has."
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub, as HF_ENDPOINT would have made it before the client was imported; and no token."""
    with serving() as server:
        server.hub.publish(*SHOWN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.delenv("HF_TOKEN")
        yield server


@pytest.fixture
def hub(server: Server) -> Hub:
    return server.hub


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty KLORA_MODELS."""
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("KLORA_BASES", "")
    return tmp_path / "models"


def leave(models: Path, name: str) -> Path:
    """The note of a build that has not fetched a base."""
    note = setup_note(models, name)
    note.write_text("not here")
    return note


def install(models: Path, name: str) -> None:
    (models / name).mkdir()
    (models / name / "model_index.json").write_text("{}")


def names() -> list[str]:
    return [base.name for base in weights.resident_bases()]


def test_a_base_that_is_named_and_missing_is_fetched(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(models, "sdxl")
    monkeypatch.setenv("KLORA_BASES", "flux-schnell,sdxl")
    assert names() == ["flux-schnell", "sdxl"]
    assert contents(models / "flux-schnell") == FILES
    hub.asked.clear()
    assert names() == ["flux-schnell", "sdxl"]
    assert hub.asked == []


def test_a_base_that_the_build_left_is_fetched_with_the_run_times_token_and_the_note_goes(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(models, "sdxl")
    note = leave(models, "flux-dev")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names() == ["sdxl", "flux-dev"]
    assert (contents(models / "flux-dev"), note.exists()) == (FILES, False)
    assert {token for kind, _, token in hub.asked if kind != "GET storage"} == {f"Bearer {TOKEN}"}


@pytest.mark.usefixtures("hub")
def test_without_a_token_that_is_said_and_the_others_serve_until_the_next_set_up_has_one(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(models, "sdxl")
    note = leave(models, "flux-dev")
    assert names() == ["sdxl"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [GATED]
    assert note.exists()
    with pytest.raises(BaseModelError, match=r"^flux-dev is not installed: .* script/download-weights flux-dev "):
        weights.find_base("flux-dev")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names() == ["sdxl", "flux-dev"]


@pytest.mark.usefixtures("hub")
def test_a_base_that_is_named_and_cannot_be_had_fails_set_up_with_its_sentence(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(models, "sdxl")
    monkeypatch.setenv("KLORA_BASES", "sdxl,flux-dev")
    with pytest.raises(BaseModelError) as error:
        weights.resident_bases()
    assert str(error.value) == GATED


@pytest.mark.parametrize("name", ["sd-1.5", "safety-checker"])
def test_a_name_that_is_no_base_is_refused_before_anything_is_fetched(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("KLORA_BASES", f"flux-schnell,{name}")
    with pytest.raises(BaseModelError, match=rf"^There is no base model '{name}'\. Expected one of sdxl, "):
        weights.resident_bases()
    assert hub.asked == [] and list(models.iterdir()) == []


@pytest.mark.usefixtures("hub")
def test_a_server_whose_only_base_cannot_be_had_is_not_ready(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(models, "flux-dev")
    with pytest.raises(BaseModelError, match=r"^A base model is not installed: "):
        weights.resident_bases()
    assert GATED in caplog.messages


def test_what_nobody_asked_for_is_not_fetched(hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(models, "sdxl")
    assert names() == ["sdxl"]
    with pytest.raises(BaseModelError, match=r"^flux-schnell is not installed: "):
        weights.training_base("flux-schnell")
    leave(models, "flux-dev")
    monkeypatch.setenv("KLORA_BASES", "sdxl")
    assert names() == ["sdxl"]
    assert hub.asked == []


def test_a_trainer_which_has_no_set_up_fetches_what_the_build_left(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(models, "flux-dev")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert weights.training_base("flux-dev")["path"] == models / "flux-dev"
    assert contents(models / "flux-dev") == FILES


def test_the_predictor_fetches_loads_and_then_goes_online_for_nothing(
    hub: Hub, bases: Path, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real base this time, tiny, from the hub into memory, where its blocks would be compiled."""
    compiled: list[str] = []
    monkeypatch.setenv("KLORA_COMPILE", "1")
    monkeypatch.setattr("klora.studio.bases.compile_blocks", lambda model, float8: compiled.append(model.name))
    caplog.set_level(logging.INFO)
    folder = bases / "flux-schnell"
    hub.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    leave(models, "flux-schnell")
    monkeypatch.setattr(tempfile, "tempdir", str(models))  # set-up makes a folder there
    predictor = Predictor()
    predictor.setup()
    assert (predictor.studio.resident, compiled) == (["flux-schnell"], ["FLUX.1"])
    kept = predictor.outputs.parent  # outlives the outputs, which each request replaces
    assert (kept.parent, kept.stat().st_mode & 0o077, [*kept.iterdir()]) == (models, 0, [])
    assert "The safety checker is not installed: requests need disable_safety_checker=true." in caplog.messages
    hub.asked.clear()
    with pytest.raises(BaseModelError, match="offline mode is enabled"):
        weights.download_base("sdxl")
    assert hub.asked == []
    with pytest.warns(ResourceWarning, match=kept.name):  # as when its process ends
        del predictor
        gc.collect()
    assert not kept.exists()


@pytest.mark.parametrize("room", ["sources", "cache"])
def test_loras_are_fetched_without_the_client_that_is_offline(room: str) -> None:
    files = list((ROOT / "klora" / room).glob("*.py"))
    assert files and not [path for path in files if "import huggingface_hub" in path.read_text()]
    assert not [path for path in files if "from huggingface_hub" in path.read_text()]


def test_a_damaged_safety_checker_fails_set_up_and_not_the_first_request(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "checker").mkdir()
    for checker, whole in ((bases / "safety-checker", True), (tmp_path / "checker", False)):
        studio = Studio(weights.find_base, checker, torch.device("cpu"))
        with nullcontext() if whole else pytest.raises(SafetyError, match=r"^The safety checker is not installed\."):
            studio.prepare([])
