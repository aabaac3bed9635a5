"""What docs/likeness.md says of the measures: their scores on drawings that they were not made of, as tables.

Knows nothing of torch and of models.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from examples.drawing import GROUNDS, SIDE, STYLES, random_scene
from examples.figures import POSES, SUBJECTS, figure
from examples.likeness import style_likeness, style_likenesses, subject_likeness

BLENDS = (0.0, 0.25, 0.5, 0.75)


@cache
def figures(subject: str, style: str, count: int) -> Sequence[Image.Image]:
    """A subject in poses that are no template's."""
    chance, pictures = random.Random(77), []
    for seed in range(count):
        centre = (chance.uniform(0.42, 0.58), chance.uniform(0.42, 0.58))
        pose = (centre, chance.uniform(0.52, 0.84), chance.uniform(-13, 13), chance.choice(list(GROUNDS)))
        pictures.append(figure(subject, pose, style).draw(1000 + seed))
    return pictures


@cache
def shapes(style: str, count: int) -> Sequence[Image.Image]:
    """Scenes of shapes, which show no subject."""
    chance = random.Random(78)
    return [replace(random_scene(chance)[0], style=style).draw(2000 + seed) for seed in range(count)]


def soft(image: Image.Image) -> Image.Image:
    """As a small model may draw it: blurred, noisy, its colours 10 of 255 off."""
    noise = np.random.default_rng(9).normal(0, 8, (SIDE, SIDE, 3)) + np.array((10, -10, 5))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=float) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def subject_table(count: int) -> Iterator[str]:
    """Rows of Markdown, a style each: for each subject right clean, right soft, wrong soft."""
    heads = [f"{subject} {kind}" for subject in SUBJECTS for kind in ("right, clean", "right, soft", "wrong, soft")]
    yield from _head("style", *heads)
    for style in STYLES:
        cells = []
        for subject in SUBJECTS:
            others = (figures(other, style, count) for other in SUBJECTS if other != subject)
            wrong = [*(image for pictures in others for image in pictures), *shapes(style, count)]
            right = figures(subject, style, count)
            cells += [_right(subject_likeness(image, subject) for image in right)]
            cells += [_right(subject_likeness(soft(image), subject) for image in right)]
            cells += [_wrong(subject_likeness(soft(image), subject) for image in wrong)]
        yield _row(style, *cells)


def style_table(count: int) -> Iterator[str]:
    """Rows of Markdown, a style each: right and wrong, clean and soft, and figures of which a share is in the style."""
    yield from _head("style", "right, clean", "wrong, clean", "right, soft", "wrong, soft", "0, ¼, ½, ¾ of it blended")
    shown = {style: [image for subject in SUBJECTS for image in figures(subject, style, count)] for style in STYLES}
    shown = {style: [*images, *shapes(style, count)] for style, images in shown.items()}
    clean = {style: [style_likenesses(image) for image in images] for style, images in shown.items()}
    softened = {style: [style_likenesses(soft(image)) for image in images] for style, images in shown.items()}
    for style in STYLES:
        cells = []
        for seen in (clean, softened):
            cells += [_right(found[style] for found in seen[style])]
            cells += [_wrong(found[style] for other in STYLES if other != style for found in seen[other])]
        blended = (np.mean([style_likeness(image, style) for image in blends(style, share)]) for share in BLENDS)
        yield _row(style, *cells, "–" if style == "plain" else ", ".join(f"{value:.2f}" for value in blended))


def blends(style: str, share: float) -> list[Image.Image]:
    """Subjects in their own poses, plain, with a share of what they are in a style."""
    poses = [(subject, pose) for subject in SUBJECTS for pose in POSES]
    return [Image.blend(figure(*of).draw(), figure(*of, style).draw(), share) for of in poses]


def _right(scores: Iterable[float]) -> str:
    values = np.array([*scores])
    return f"{values.mean():.2f} ± {values.std():.2f} ({np.quantile(values, 0.05):.2f})"


def _wrong(scores: Iterable[float]) -> str:
    values = np.array([*scores])
    return f"{values.mean():.2f} ({np.quantile(values, 0.95):.2f})"


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
