"""A studio on the tiny bases, quick requests of it, and the images that it makes of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weights
from klora.cache import Borrowed
from klora.form.request import Request
from klora.studio import Studio

CPU = torch.device("cpu")
PLENTY = 1 << 40
OTHER = {"sdxl": "flux", "flux": "sdxl"}

Images = dict[int, np.ndarray]


def open_studio(checker: Path, free: Callable[[torch.device], int] = lambda device: PLENTY) -> Studio:
    return Studio(weights.find_base, checker, CPU, free)


def request(**given: Any) -> Request:
    quick = {"prompt": "a photo of a dog", "num_inference_steps": 3, "seed": 7, "disable_safety_checker": True}
    return Request(**{**quick, **given})


def made(studio: Studio, asked: Request, files: Mapping[str, Borrowed], **options: Any) -> Images:
    return {index: np.asarray(image) for index, image in studio.make(asked, files, **options).items()}


def same(first: Images, second: Images) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[index], second[index]) for index in first)
