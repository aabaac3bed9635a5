"""The tiny base of a family, and where a test's LoRA file is."""

from pathlib import Path

import pytest

from klora.models import FAMILIES
from klora.models.family import Family


@pytest.fixture(params=FAMILIES)
def model(families: dict[str, Family], request: pytest.FixtureRequest) -> Family:
    return families[request.param]


@pytest.fixture
def sdxl(families: dict[str, Family]) -> Family:
    return families["sdxl"]


@pytest.fixture
def flux(families: dict[str, Family]) -> Family:
    return families["flux"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"
