"""A prompt, a photo, and images that a family makes of them in a few steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from klora.form.request import Request
from klora.models.family import Family

CPU = torch.device("cpu")
BASES = {"sdxl": "sdxl", "flux-dev": "flux", "flux-schnell": "flux"}  # base: its family
PROMPT = "a photo of a sks dog"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(width: int = 64, height: int = 64) -> Image.Image:
    """Coloured squares of 8 pixels."""
    cells = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(cells.repeat(8, axis=0).repeat(8, axis=1))


def pixels_of(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None]


def paint(model: Family, on_step: Callable[[int], None] = lambda step: None, **options: Any) -> np.ndarray:
    """Levels [N, H, W, 3] in 0 .. 255, of four steps of 64 x 64 unless the options say otherwise."""
    defaults = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 4, "seed": 0}
    request = Request(**(defaults | options))
    with torch.no_grad():
        images = model.sample(model.encode_prompt([request.prompt]), request, on_step)
    return np.stack([np.asarray(image, dtype=int) for image in images])


def reconstruction(model: Family, image: Image.Image) -> Tensor:
    """The image through the VAE and back, [1, 3, H, W]; its latents are the posterior's mode."""
    with torch.no_grad():
        return model.pipe.vae(pixels_of(image), sample_posterior=False).sample
