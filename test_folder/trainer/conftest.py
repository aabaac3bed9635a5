"""Tiny bases to be trained on, each loaded by parts, and four pictures."""

from functools import partial
from pathlib import Path

import pytest

from klora import FAMILIES, load_model
from klora.training.dataset import Picture
from klora.training.loop import Load
from test_folder.tiny import BASES
from test_folder.trainer.material import four_pictures


@pytest.fixture(scope="session", autouse=True)
def brief(few_points: None) -> None:
    """Trainings here are of a few steps."""


@pytest.fixture(params=FAMILIES)
def load(request: pytest.FixtureRequest, bases: Path) -> Load:
    return partial(load_model, request.param, bases / BASES[request.param])


@pytest.fixture
def sdxl(bases: Path) -> Load:
    return partial(load_model, "sdxl", bases / "sdxl")


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return four_pictures()
