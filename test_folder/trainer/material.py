"""Pictures and settings of short trainings."""

import dataclasses
import io
from typing import Any

import torch
from PIL import Image

from klora.training.config import TrainConfig
from klora.training.dataset import Picture

SETTINGS: dict[str, Any] = {"steps": 6, "learning_rate": 1e-3, "lora_rank": 4, "resolution": "64", "seed": 3,
                            "sample_steps": 0, "gradient_checkpointing": "off"}  # fmt: skip
QUICK = TrainConfig(**SETTINGS)
CPU = torch.device("cpu")


def config(**settings: Any) -> TrainConfig:
    return dataclasses.replace(QUICK, **settings)


def four_pictures() -> list[Picture]:
    """Four colours in three shapes, two of them captioned."""
    colours = [("red", (64, 64)), ("green", (96, 64)), ("blue", (64, 96)), ("white", (80, 80))]
    return [
        picture(i, colour, size, f"a {colour} [trigger] toy" if i % 2 else None)
        for i, (colour, size) in enumerate(colours)
    ]


def picture(
    number: int, colour: Any, size: tuple[int, int] = (64, 64), caption: str | None = None, mask: Any = None
) -> Picture:
    return Picture(f"{number}.png", png(Image.new("RGB", size, colour)), caption, None if mask is None else png(mask))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
