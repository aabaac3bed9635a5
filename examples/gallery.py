"""The pairs of LoRAs and the ways to fuse them that the demo shows and script/evaluate scores.

Knows nothing of torch, of models and of servers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from examples.drawing import STYLES, TAUGHT, at_full_size
from examples.figures import SUBJECTS
from examples.likeness import style_likeness, subject_likeness

BASES: Mapping[str, Mapping[str, float]] = {
    "sdxl": {"num_inference_steps": 20, "guidance_scale": 2.5},
    "flux-dev": {"num_inference_steps": 20, "guidance_scale": 3.5},
}
"""Inputs that suit the toy bases."""

PAIRS = [(subject, style) for subject in SUBJECTS for style in STYLES if style not in TAUGHT]
WAYS: dict[str, dict[str, Any]] = {
    "content only": {"fusion": "content"},
    "style only": {"fusion": "style"},
    "sum": {"fusion": "sum"},
    "K-LoRA s": {"fusion": "klora", "pattern": "s"},
    "K-LoRA s, style_bias 0.6": {"fusion": "klora", "pattern": "s", "style_bias": 0.6},
    "K-LoRA s, style_bias 0.85": {"fusion": "klora", "pattern": "s", "style_bias": 0.85},
    "K-LoRA s, style_bias 1.15": {"fusion": "klora", "pattern": "s", "style_bias": 1.15},
    "K-LoRA s*": {"fusion": "klora", "pattern": "s*"},
}
"""Inputs of a request by what its picture is called."""

LORAS = Path(__file__).parent / "toy" / "loras"


def lora_file(base: str, name: str) -> Path:
    """A LoRA of a subject or a style, from LORAS."""
    return Path(base, f"{name}.safetensors")


def prompt(subject: str) -> str:
    """What is asked for, with both trigger words; the ground is the style's."""
    return f"a sbu {subject}, in szn style"


def scores(images: Sequence[Image.Image], subject: str, style: str) -> dict[str, list[float]]:
    """How much each image shows the subject, the style, and the lesser of the two; each in [0, 1]."""
    whole = [at_full_size(image) for image in images]
    shown = [subject_likeness(image, subject) for image in whole]
    drawn = [style_likeness(image, style) for image in whole]
    return {"subject": shown, "style": drawn, "both": [min(pair) for pair in zip(shown, drawn, strict=True)]}
