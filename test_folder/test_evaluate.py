"""The evaluation's own parts: what the VAE alone costs a drawing, and the table."""

from types import ModuleType, SimpleNamespace

import diffusers
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from in_venv import program

from examples.architectures import SIDES
from examples.gallery import LORAS, PAIRS, scores


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return program("evaluate")


@pytest.mark.parametrize(("subject", "style"), PAIRS)
def test_a_drawing_that_went_through_the_vae_shows_subject_and_style(
    script: ModuleType, subject: str, style: str
) -> None:
    """It is the most that a fusion can reach; 1 is what an untouched drawing scores.

    Another of its kind shows much less.
    """
    vae = diffusers.AutoencoderKL.from_pretrained(LORAS.parent / "flux-dev" / "vae")
    pipe = SimpleNamespace(vae=vae, image_processor=VaeImageProcessor())
    model = SimpleNamespace(pipe=pipe, native_size=SIDES["flux-dev"])
    images, another = script.drawn(model, subject, style, 4).values()
    found = scores(images, subject, style)
    assert {name: len(values) for name, values in found.items()} == {"subject": 4, "style": 4, "both": 4}
    assert found["both"] == [min(pair) for pair in zip(found["subject"], found["style"], strict=True)]
    assert np.mean(found["both"]) > 0.8
    assert np.mean(scores(another, subject, style)["subject"]) < np.mean(found["subject"]) - 0.4


def test_the_table_has_a_row_for_each_base_and_way(script: ModuleType) -> None:
    accuracy = {"shape": 0.905, "colour": 1.0, "ground": 1.0, "all": 0.9}
    fusion = {way: {name: [0.25, 0.75] for name in ("subject", "style", "both")} for way in ("sum", "drawn")}
    lines = script.table({"sdxl": {"accuracy": accuracy, "fusion": fusion}}).splitlines()
    assert "| sdxl | 90.5% | 100.0% | 100.0% | 90.0% |" in lines
    assert "| sdxl | sum | 0.50 ± 0.35 | 0.50 ± 0.35 | 0.50 ± 0.35 |" in lines
    assert len(lines) == 8
