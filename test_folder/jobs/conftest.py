"""A working folder for each training, and the tar of one that nothing disturbed."""

from pathlib import Path

import pytest

from test_folder.jobs.short import entered, trained


@pytest.fixture(scope="session", autouse=True)
def brief(few_points: None) -> None:
    """Trainings here are of a few steps."""


@pytest.fixture(autouse=True)
def shell(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a folder of pictures, and the tiny bases installed."""
    entered(tmp_path, bases, monkeypatch)


@pytest.fixture(scope="module")
def quick(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tar of a training of those pictures by SETTINGS alone."""
    with pytest.MonkeyPatch.context() as patch:
        entered(tmp_path_factory.mktemp("quick"), bases, patch)
        trained("quick.tar")
        return Path("quick.tar").resolve()
