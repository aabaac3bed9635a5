"""The environment is read when it is asked for, and not before."""

import os
import runpy

import pytest

import weights


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
