"""An environment without settings, and bases that are installed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from test_folder.naming.places import KLORA_VARIABLES, folder_of_bases


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KLORA_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back as it was, even where it was unset
        monkeypatch.delenv(name)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make these bases the installed ones."""
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))
    return lambda *names: folder_of_bases(tmp_path, *names)
