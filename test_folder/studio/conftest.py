"""LoRAs that fit every base of their family, a studio, a fresh one, and what it drew when it was new."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from klora.studio import Studio
from test_folder import tiny
from test_folder.pairs import pair_of
from test_folder.studio.opening import Images, made, open_studio, request


@pytest.fixture(scope="module")
def loras(loras: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's LoRAs, for every base of their family, SDXL's style with layers of the first text encoder, too."""
    folder = tmp_path_factory.mktemp("loras")
    for file in loras.iterdir():
        every = {key: tensor for key, tensor in load_file(file).items() if "guidance_embedder" not in key}
        save_file(every, folder / file.name)  # schnell has no guidance
    shapes = tiny.linear_shapes(CLIPTextModel.from_pretrained(bases / "sdxl" / "text_encoder"))
    encoder = tiny.save_lora(folder / "encoder.safetensors", tiny.random_lora(shapes, seed=3), prefix="text_encoder")
    style = folder / "sdxl_style.safetensors"
    save_file(load_file(style) | load_file(encoder), style)
    return folder


@pytest.fixture(scope="module")
def models(bases: Path) -> Iterator[Path]:
    """The tiny bases, as those that are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KLORA_MODELS", str(bases))
        yield bases


@pytest.fixture
def fresh(models: Path) -> Studio:
    """A studio that has done nothing yet."""
    return open_studio(models / "safety-checker")


@pytest.fixture(scope="module")
def studio(models: Path) -> Studio:
    """One studio for all tests that do not look into it: what it did before must not matter."""
    return open_studio(models / "safety-checker")


@pytest.fixture(scope="module")
def first(studio: Studio, loras: Path) -> dict[str, Images]:
    """What it drew when it was new, by family."""
    return {family: made(studio, request(), pair_of(loras, family)) for family in tiny.BASES}
