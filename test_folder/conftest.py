"""What every test stands on: one thread, no network, and tiny bases built once a session."""

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import diffusers
import pytest
import torch
import transformers

from test_folder import tiny

torch.set_num_threads(1)  # models this small are fastest so, and tests of two processes do not fight over cores
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like KLORA_MODELS, with every base, tiny and random."""
    return tiny.build_bases(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def loras(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with content and style LoRAs, {sdxl,flux}_{content,style}.safetensors, ranks 4 and 8."""
    folder = tmp_path_factory.mktemp("loras")
    for family, base, component in (("sdxl", "sdxl", "unet"), ("flux", "flux-dev", "transformer")):
        model = getattr(diffusers.DiffusionPipeline.from_pretrained(bases / base), component)
        for seed, (role, rank) in enumerate((("content", 4), ("style", 8))):
            layers = tiny.random_lora(tiny.linear_shapes(model), rank, seed=seed)
            tiny.save_lora(folder / f"{family}_{role}.safetensors", layers, prefix=component)
    return folder
