"""What the toy bases learn from: captioned scenes without end, and their pictures and captions as tensors."""

import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from examples.drawing import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, STYLES, Scene, random_scene
from examples.figures import SUBJECTS, kin, random_figure

FIGURES, KIN = {1}, {2, 4}  # of each eight scenes


def scenes(start: int, stop: int, count: int) -> list[tuple[Scene, str]]:
    """Scenes start to stop, of count in all, with captions: one in eight is a figure, each of which comes eight times,
    in other poses, places and styles, so that its name means its parts and a style's phrase how they are drawn; two are
    of the kinds of the LoRAs' subjects.
    """
    made = []
    for number in range(start, stop):
        chance = random.Random(f"scene {number}")
        if number % 8 in FIGURES:
            made.append(random_figure(chance, random.Random(f"figure {number % (count // 8)}")))
        elif number % 8 in KIN:
            made.append(kin(chance.choice(list(SUBJECTS)), chance))
        else:
            made.append(random_scene(chance))
    return made


def any_picture(chance: random.Random) -> Image.Image:
    """A scene of any kind in any style, also those that the bases are not taught: the VAE must be able to show them."""
    kinds = [random_scene, random_figure, *(partial(kin, subject) for subject in SUBJECTS)]
    scene, _ = chance.choices(kinds, (4, 2, 1, 1))[0](chance)
    return Scene(scene.parts, scene.ground, chance.choice(list(STYLES))).draw(chance.randrange(1 << 30))


def save_drawings(path: Path, count: int, others: int, workers: int) -> None:
    """Draw count scenes, scene i by seed i, and others in any style, by processes, into a file that read_drawings() and
    read_captions() read."""
    with ProcessPoolExecutor(workers) as pool:
        starts = range(0, count, _CHUNK)
        drawn = pool.map(_drawn, starts, [min(at + _CHUNK, count) for at in starts], [count] * len(starts))
        pixels, captions = zip(*drawn, strict=True)
        starts = range(0, others, _CHUNK)
        more = pool.map(_drawn_in_any_style, starts, [min(at + _CHUNK, others) for at in starts])
        tensors = {
            "scenes": torch.from_numpy(np.concatenate(pixels)),
            "others": torch.from_numpy(np.concatenate([*more])),
        }
    save_file(tensors, path, {"captions": "\n".join(caption for some in captions for caption in some)})


def read_drawings(path: Path, name: str) -> Tensor:
    """Pictures, uint8 [N, 3, H, W]: "scenes" or "others"."""
    with safe_open(path, "pt") as file:
        pictures: Tensor = file.get_tensor(name)
    return pictures


def read_captions(path: Path) -> list[str]:
    """Of the scenes."""
    with safe_open(path, "pt") as file:
        captions: str = file.metadata()["captions"]
    return captions.split("\n")


_CHUNK = 128  # pictures that a process draws at once


def _drawn(start: int, stop: int, count: int) -> tuple[np.ndarray, list[str]]:
    numbered = enumerate(scenes(start, stop, count), start)
    pictures, captions = zip(*((scene.draw(seed), caption) for seed, (scene, caption) in numbered), strict=True)
    return _stacked(pictures), list(captions)


def _drawn_in_any_style(start: int, stop: int) -> np.ndarray:
    return _stacked(any_picture(random.Random(f"picture {number}")) for number in range(start, stop))


def _stacked(images: Iterable[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


def levels(pixels: Tensor, side: int) -> Tensor:
    """Pictures of bytes as a VAE reads them: float32 [N, 3, side, side] in [-1, 1]."""
    return adaptive_avg_pool2d(pixels.float() / 127.5 - 1, side)


def pixels_of(images: Iterable[Image.Image]) -> Tensor:
    """Pictures as read_drawings() has them: uint8 [N, 3, H, W]."""
    return torch.from_numpy(_stacked(images))


def labels(caption: str) -> list[bool]:
    """What a caption names: coloured shapes, a subject's kind, ground, size, places, style."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return [name in caption for name in (*things, *SUBJECTS, *GROUNDS, *SIZES, *PLACES, *STYLES)]
