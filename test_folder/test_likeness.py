"""Both measures tell right from wrong, in drawings that they were not made of, crisp ones and such as a model makes."""

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples import likeness
from examples.drawing import GROUNDS, SIDE, STYLES, TAUGHT, Part, Scene, random_scene
from examples.figures import POSES, SUBJECTS, figure
from examples.likeness import style_likeness, subject_likeness

BROUGHT = [style for style in STYLES if style not in TAUGHT]
OTHER = {"robot": "flower", "flower": "robot"}
COUNT = 6

each_subject = pytest.mark.parametrize("subject", SUBJECTS)
each_style = pytest.mark.parametrize("style", STYLES)


@cache
def figures(subject: str, style: str) -> list[Image.Image]:
    """A subject in poses that are no template's."""
    chance, pictures = random.Random(77), []
    for seed in range(COUNT):
        centre = (chance.uniform(0.42, 0.58), chance.uniform(0.42, 0.58))
        pose = (centre, chance.uniform(0.52, 0.84), chance.uniform(-13, 13), chance.choice(list(GROUNDS)))
        pictures.append(figure(subject, pose, style).draw(1000 + seed))
    return pictures


@cache
def shapes(style: str) -> list[Image.Image]:
    chance = random.Random(78)
    return [replace(random_scene(chance)[0], style=style).draw(2000 + seed) for seed in range(COUNT)]


def soft(image: Image.Image) -> Image.Image:
    """As a small model may draw it: blurred, noisy, its colours 10 of 255 off."""
    noise = np.random.default_rng(9).normal(0, 8, (SIDE, SIDE, 3)) + np.array((10, -10, 5))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=float) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mean_subject(images: list[Image.Image], subject: str) -> float:
    return float(np.mean([subject_likeness(image, subject) for image in images]))


def mean_style(images: list[Image.Image], style: str) -> float:
    return float(np.mean([style_likeness(image, style) for image in images]))


@each_style
@each_subject
def test_a_subject_is_seen_in_every_style(subject: str, style: str) -> None:
    """A mosaic's tiles leave less of small figures."""
    assert mean_subject(figures(subject, style), subject) >= (0.8 if style == "mosaic" else 0.95)


@each_style
@each_subject
def test_what_is_not_the_subject_scores_little(subject: str, style: str) -> None:
    assert mean_subject(figures(OTHER[subject], style), subject) <= 0.2
    assert mean_subject(shapes(style), subject) <= 0.2


@each_style
@each_subject
def test_a_ground_alone_is_no_subject(subject: str, style: str) -> None:
    assert max(subject_likeness(Scene((), GROUNDS[ground], style).draw(), subject) for ground in GROUNDS) <= 0.05


@pytest.mark.parametrize("style", ["plain", *BROUGHT])
@each_subject
def test_softness_and_noise_hide_no_subject(subject: str, style: str) -> None:
    softened = mean_subject([soft(image) for image in figures(subject, style)], subject)
    assert softened >= mean_subject(figures(subject, style), subject) - 0.1


@each_subject
def test_half_a_subject_scores_between(subject: str) -> None:
    image = figure(subject).draw()
    whole = subject_likeness(image, subject)
    image.paste(GROUNDS["white"], (0, SIDE * 5 // 8, SIDE, SIDE))
    assert 0.05 < subject_likeness(image, subject) < 0.9 < whole


@each_subject
def test_a_subject_of_other_colours_scores_between(subject: str) -> None:
    whole = figure(subject)
    parts = tuple(Part(part.points, part.colour[1:] + part.colour[:1]) for part in whole.parts)
    assert 0.05 < subject_likeness(replace(whole, parts=parts).draw(), subject) < 0.9


@each_style
def test_a_style_is_told_whatever_is_shown(style: str) -> None:
    """A small plain figure is much like an outline of it."""
    images = [*figures("robot", style), *figures("flower", style), *shapes(style)]
    assert mean_style(images, style) >= (0.75 if style in ("plain", "outline") else 0.9)


@each_style
def test_other_styles_score_little(style: str) -> None:
    images = [
        image for other in STYLES if other != style for image in (*figures("robot", other)[:3], *shapes(other)[:3])
    ]
    assert mean_style(images, style) <= 0.1


@pytest.mark.parametrize("style", BROUGHT)
def test_softness_and_noise_hide_no_style(style: str) -> None:
    assert mean_style([soft(image) for image in figures("robot", style) + shapes(style)], style) >= 0.85
    assert mean_style([soft(image) for image in figures("robot", "plain") + shapes("plain")], style) <= 0.1


@pytest.mark.parametrize("style", BROUGHT)
def test_a_plain_subject_has_no_style_that_a_lora_brings(style: str) -> None:
    images = [figure(subject, pose).draw() for subject in SUBJECTS for pose in POSES]
    assert mean_style(images, style) <= 0.1


@pytest.mark.parametrize("style", BROUGHT)
@each_subject
def test_a_picture_half_in_a_style_scores_between(subject: str, style: str) -> None:
    halves = [(figure(subject, pose).draw(), figure(subject, pose, style).draw()) for pose in POSES]
    plain, half, full = (mean_style([Image.blend(*pair, share) for pair in halves], style) for share in (0, 0.5, 1))
    assert plain + 0.1 < half < full - 0.1


def test_likenesses_are_shares() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    for image in (noise, Image.new("RGB", (SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE), "white"), *shapes("neon")):
        values = [subject_likeness(image, subject) for subject in SUBJECTS]
        values += [style_likeness(image, style) for style in STYLES]
        assert all(isinstance(value, float) and 0 <= value <= 1 for value in values)


def test_the_same_picture_scores_the_same_when_all_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "EXAMPLES", 2)
    first, second = likeness._fit.__wrapped__(), likeness._fit.__wrapped__()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
