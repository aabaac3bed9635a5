"""The quick check: `python test_folder/simple_test.py` prints a line for each test; pytest runs the same ones.

Imports work, versions are the pinned ones, and on a tiny SDXL base K-LoRA draws something of its own. Needs no network.
"""

import importlib
import re
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import numpy as np
import torch
import transformers

import klora
from klora import LoRA, Request, generate, load_model
from test_folder import tiny

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS, SETUP = ROOT / "requirements.txt", ROOT / "script" / "setup"


def test_everything_imports() -> None:
    for name in ("klora", "klora.cli", "klora.studio", "weights", "predict"):
        importlib.import_module(name)


def test_installed_versions_are_the_pinned_ones() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", REQUIREMENTS.read_text(), re.MULTILINE))
    # The image has a torch for CUDA, a laptop a newer one; what only some trainings need, a laptop may lack.
    left = {"torch", *re.search(r"\^\(([\w|-]+)\)==", SETUP.read_text())[1].split("|")}
    assert {name: version(name) for name in pinned if name not in left} == {
        name: seen for name, seen in pinned.items() if name not in left
    }
    assert left <= pinned.keys()


def test_the_package_knows_its_version() -> None:
    assert klora.__version__ == version("klora")


def test_klora_draws_what_neither_the_base_nor_the_sum_of_both_loras_draws() -> None:
    fused = drawn(both=True)
    assert fused.shape == (64, 64, 3)
    assert np.abs(fused - drawn(both=False)).mean() > 1
    assert np.abs(fused - drawn(both=True, fusion="sum")).mean() > 1


def test_the_same_seed_draws_the_same_image() -> None:
    first, other, again = (drawn(both=True, seed=seed) for seed in (1, 2, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@cache
def parts() -> tuple[Any, LoRA, LoRA]:
    """A tiny SDXL, a content LoRA and a style LoRA for it."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model("sdxl", tiny.build_sdxl(Path(folder) / "sdxl"), torch.device("cpu"))
        shapes = tiny.linear_shapes(model.denoiser)
        files = [
            tiny.save_lora(Path(folder) / f"{seed}.safetensors", tiny.random_lora(shapes, seed=seed)) for seed in (0, 1)
        ]
        content, style = map(model.read_lora, files)
    return model, content, style


def drawn(*, both: bool, **given: Any) -> np.ndarray:
    """Pixels of one image, int [64, 64, 3], with both LoRAs or none."""
    model, content, style = parts()
    loras = {"content": content, "style": style} if both else {}
    request = Request(**{"prompt": "a photo of a dog", "num_inference_steps": 4, "seed": 0, **given})
    return np.asarray(generate(model, request, **loras)[0], int)


def main() -> None:
    """Run the tests in order; the first that fails ends the run with its traceback."""
    torch.set_num_threads(1)  # models this small are fastest so
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    for name, test in [*globals().items()]:
        if name.startswith("test_"):
            test()
            print(f"ok  {name.removeprefix('test_').replace('_', ' ')}")


if __name__ == "__main__":
    main()
