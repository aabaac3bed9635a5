"""The environment is read when it is asked for, and not before."""

import os
import runpy

import pytest

import weights
from klora.errors import RequestError


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


@pytest.mark.parametrize(("text", "kind"), [(None, None), ("", None), ("0", None), ("1", "own"), ("float8", "float8")])
def test_blocks_are_compiled_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, text: str | None, kind: str | None
) -> None:
    monkeypatch.delenv("KLORA_COMPILE", raising=False)
    if text is not None:
        monkeypatch.setenv("KLORA_COMPILE", text)
    assert weights.compiled_blocks() == kind


@pytest.mark.parametrize("text", ["yes", "2", "fp8", "own"])
def test_another_way_to_compile_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KLORA_COMPILE", text)
    with pytest.raises(RequestError) as error:
        weights.compiled_blocks()
    assert str(error.value) == (f"KLORA_COMPILE is {text!r}. Expected 1 to compile the bases' blocks, or float8, or 0.")


@pytest.mark.parametrize("address", ["hub.example.com", "ftp://h", "https://", "http://[h", "http://user:hunter2@h:x"])
@pytest.mark.parametrize("name", weights.AUTHORITIES.values())
def test_an_authority_that_is_at_no_web_address_is_refused_by_its_settings_name(
    name: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, address)
    with pytest.raises(RequestError) as refusal:
        weights._authorities()
    assert str(refusal.value) == f"{name} is no web address. Expected one, as in https://hub.example.com."
