"""LoRAs of some of a base's layers, and what is drawn with them."""

from pathlib import Path
from typing import Any

import numpy as np

from klora import generate
from klora.form.request import Request
from klora.lora import LoRA
from klora.models.family import Family
from test_folder import tiny


def lora(model: Family, rank: int, folder: Path, seed: int = 0, layers: int | None = None) -> LoRA:
    """Of the last layers of a base, or all."""
    shapes = dict(list(tiny.linear_shapes(model.denoiser).items())[-(layers or 0) :])
    pairs = tiny.random_lora(shapes, rank, seed=seed)
    return model.read_lora(tiny.save_lora(folder / f"{rank}.safetensors", pairs, prefix=model.component))


def made(model: Family, facts: dict[str, Any] | None = None, **inputs: Any) -> np.ndarray:
    """Pixels of a request's images, [N, H, W, 3]. inputs: its own, and LoRAs; facts: takes what is recorded."""
    loras = {name: inputs.pop(name) for name in ("content", "style") if name in inputs}
    given = {"prompt": "a dog", "seed": 3, "num_inference_steps": 6, "width": 64, "height": 64} | inputs
    record = facts.__setitem__ if facts is not None else lambda name, value: None
    return np.stack([np.asarray(image) for image in generate(model, Request(**given), record=record, **loras)])
