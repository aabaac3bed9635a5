"""A tiny base of each family, and where a test's LoRA file is."""

from pathlib import Path

import pytest
import torch

from klora.models import FAMILIES, load_model
from klora.models.family import Family
from test_folder.tiny import BASES


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    return {family: load_model(family, bases / base, torch.device("cpu")) for family, base in BASES.items()}


@pytest.fixture(params=FAMILIES)
def model(models: dict[str, Family], request: pytest.FixtureRequest) -> Family:
    return models[request.param]


@pytest.fixture
def sdxl(models: dict[str, Family]) -> Family:
    return models["sdxl"]


@pytest.fixture
def flux(models: dict[str, Family]) -> Family:
    return models["flux"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"
