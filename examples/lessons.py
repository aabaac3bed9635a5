"""What the toy bases learn from: captioned scenes without end, and their pictures and captions as tensors."""

import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

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
    """A random scene in any style, also those that the bases are not taught: the VAE must be able to show them."""
    scene, _ = random_scene(chance)
    style = scene.style if chance.random() < 0.5 else chance.choice(list(STYLES))
    return Scene(scene.parts, scene.ground, style).draw(chance.randrange(1 << 30))


def pictures(scenes: Sequence[tuple[Scene, str]], batch: int, workers: int) -> Iterable[Tensor]:
    """Scene i drawn by seed i, batch after batch, as pixels_of() has them. workers: processes that draw."""
    return DataLoader(list(enumerate(scenes)), batch, num_workers=workers, collate_fn=_drawn)


def _drawn(numbered: list[tuple[int, tuple[Scene, str]]]) -> Tensor:
    return pixels_of(scene.draw(seed) for seed, (scene, _) in numbered)


def pixels_of(images: Iterable[Image.Image]) -> Tensor:
    """Float32 [N, 3, H, W] in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]) / 127.5 - 1


def labels(caption: str) -> list[bool]:
    """What a caption names: coloured shapes, a subject's kind, ground, size, places, style."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return [name in caption for name in (*things, *SUBJECTS, *GROUNDS, *SIZES, *PLACES, *STYLES)]
