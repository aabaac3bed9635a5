"""What is exported, as a form asks for it, and what dense arithmetic makes of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from klora import LoRA, LowRank, save_lora
from klora.cache import Borrowed
from klora.form.pair import Export
from klora.models.family import Family
from test_folder import tiny

STEPS = 8
# Of many forms; ranks 6 and 5 are more than the sides of the thin ones.
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32), "thin": (3, 30), "small": (4, 2), "even": (16, 16)}
OWN = {"content": "contents_own", "style": "styles_own"}


def pairs(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, LowRank]:
    return {name: LowRank(*factors) for name, factors in tiny.random_lora(shapes, rank, seed=seed).items()}


def lora(role: str, rank: int, seed: int, **texts: Mapping[str, LowRank]) -> LoRA:
    return LoRA(pairs({**SHAPES, OWN[role]: (12, 20)}, rank, seed), texts)


def dense(pair: LowRank | None, like: LowRank | None = None) -> Tensor:
    if pair is None:
        return torch.zeros_like(dense(like))
    return pair.B.double() @ pair.A.double()


def installed(bases: Path) -> dict[str, tuple[str, Path]]:
    return {base: (family, bases / base) for family, base in tiny.BASES.items()}


def wanted(**given: Any) -> Export:
    return Export(**{"content_lora": "a", "style_lora": "b", "num_inference_steps": STEPS, **given})


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {**metadata, "klora_export": json.loads(metadata["klora_export"])}


def with_text_encoder(model: Family, given: Mapping[str, Borrowed], folder: Path) -> dict[str, Borrowed]:
    """The same LoRAs, each with a text encoder's layers, and the trigger word of a training."""
    texts = tiny.linear_shapes(model.text_encoders["text_encoder"])
    found = {}
    for seed, (name, file) in enumerate(given.items()):
        read = model.read_lora(file.path)
        both = LoRA(read.layers, {"text_encoder": pairs(texts, 2, seed)}, {"ss_trigger": ("sbu", "szn")[seed]})
        found[name] = Borrowed(save_lora(folder / file.path.name, both, model.component))
    return found
