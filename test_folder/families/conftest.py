"""One tiny model of each base."""

from pathlib import Path

import pytest

from klora.models import load_model
from klora.models.family import Family
from test_folder.families.painting import BASES, CPU


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    """One of each base, shared: its parameters need no gradient, and no test may leave a trace in it."""
    loaded = {base: load_model(family, bases / base, CPU) for base, family in BASES.items()}
    for model in loaded.values():
        for part in (model.denoiser, model.pipe.vae, *model.text_encoders.values()):
            part.requires_grad_(False)
    return loaded


@pytest.fixture(params=BASES)
def model(models: dict[str, Family], request: pytest.FixtureRequest) -> Family:
    return models[request.param]


@pytest.fixture
def sdxl(models: dict[str, Family]) -> Family:
    return models["sdxl"]
