"""Tiny bases to be drawn with fast."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from klora.models import load_model, pace
from klora.models.family import Family
from test_folder.tiny import BASES


@pytest.fixture
def load(bases: Path) -> Callable[[str], Family]:
    return lambda family: load_model(family, bases / BASES[family], torch.device("cpu"))


@pytest.fixture
def flux(load: Callable[[str], Family]) -> Family:
    return load("flux")


@pytest.fixture(autouse=True)
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of random numbers changes more between steps than one that has learnt to draw."""
    monkeypatch.setattr(pace, "THRESHOLD", 0.3)
