"""Prompt files, and a look at the folders of images that are made of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from klora import cli
from klora.bulk.lines import PromptFile, read_prompts
from klora.studio.provenance import UsedLoRA, picture_sha256

CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 2, "disable_safety_checker": True, "output_format": "png"}
PROMPTS = ("a photo of a dog", "a red house by the sea", "two cats")
OPTIONS = ("--num-inference-steps", "2", "--disable-safety-checker", "--model", "sdxl")  # of the command
ONE_LEVEL = 1  # of 255, by which an image in a batch may differ from itself alone: a batched product rounds otherwise
Runs = Callable[..., list[str]]


def unchecked(loras: Mapping[str, UsedLoRA]) -> None:
    """Whatever LoRAs an image would be drawn with."""


def written(path: Path, *lines: str | Mapping[str, Any]) -> Path:
    """A prompt file."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def generated(*arguments: str) -> Result:
    """`klora generate`, quick."""
    return CliRunner().invoke(cli.app, ["generate", *arguments, *OPTIONS])


def read(path: Path, **common: Any) -> PromptFile:
    return read_prompts(path, {**QUICK, "seed": 5, **common})


def far(first: Image.Image, second: Image.Image) -> int:
    """In levels of 255."""
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


def pictures(folder: Path) -> dict[str, str]:
    """{name: its pixels} of what is there."""
    return {file.name: picture_sha256(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """{name: (when it was written, content)} of all that is there."""
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
