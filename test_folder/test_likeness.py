"""Both measures tell right from wrong, in drawings that they were not made of, crisp ones and such as a model makes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from in_venv import program
from PIL import Image

from examples import likeness
from examples.calibration import blends, figures, shapes, soft
from examples.drawing import GROUNDS, SIDE, STYLES, TAUGHT, Part, Scene
from examples.figures import SUBJECTS, figure
from examples.likeness import style_likeness, subject_likeness

BROUGHT = [style for style in STYLES if style not in TAUGHT]
OTHER = {"robot": "flower", "flower": "robot"}
COUNT = 6

each_subject = pytest.mark.parametrize("subject", SUBJECTS)
each_style = pytest.mark.parametrize("style", STYLES)


def mean_subject(images: Sequence[Image.Image], subject: str) -> float:
    return float(np.mean([subject_likeness(image, subject) for image in images]))


def mean_style(images: Sequence[Image.Image], style: str) -> float:
    return float(np.mean([style_likeness(image, style) for image in images]))


@each_style
@each_subject
def test_a_subject_is_seen_in_every_style(subject: str, style: str) -> None:
    """A mosaic's tiles leave less of small figures."""
    assert mean_subject(figures(subject, style, COUNT), subject) >= (0.8 if style == "mosaic" else 0.95)


@each_style
@each_subject
def test_what_is_not_the_subject_scores_little(subject: str, style: str) -> None:
    assert mean_subject(figures(OTHER[subject], style, COUNT), subject) <= 0.2
    assert mean_subject(shapes(style, COUNT), subject) <= 0.2


@each_style
@each_subject
def test_a_ground_alone_is_no_subject(subject: str, style: str) -> None:
    assert max(subject_likeness(Scene((), GROUNDS[ground], style).draw(), subject) for ground in GROUNDS) <= 0.05


@pytest.mark.parametrize("style", ["plain", *BROUGHT])
@each_subject
def test_softness_and_noise_hide_no_subject(subject: str, style: str) -> None:
    softened = mean_subject([soft(image) for image in figures(subject, style, COUNT)], subject)
    assert softened >= mean_subject(figures(subject, style, COUNT), subject) - 0.1


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
    images = [*figures("robot", style, COUNT), *figures("flower", style, COUNT), *shapes(style, COUNT)]
    assert mean_style(images, style) >= (0.75 if style in ("plain", "outline") else 0.9)


@each_style
def test_other_styles_score_little(style: str) -> None:
    others = [other for other in STYLES if other != style]
    images = [image for other in others for image in (*figures("robot", other, 3), *shapes(other, 3))]
    assert mean_style(images, style) <= 0.1


@pytest.mark.parametrize("style", BROUGHT)
def test_softness_and_noise_hide_no_style(style: str) -> None:
    assert mean_style([*map(soft, (*figures("robot", style, COUNT), *shapes(style, COUNT)))], style) >= 0.85
    assert mean_style([*map(soft, (*figures("robot", "plain", COUNT), *shapes("plain", COUNT)))], style) <= 0.1


@pytest.mark.parametrize("style", BROUGHT)
def test_a_plain_subject_has_no_style_that_a_lora_brings(style: str) -> None:
    assert mean_style(blends(style, 0.0), style) <= 0.1


@pytest.mark.parametrize("style", BROUGHT)
def test_a_picture_half_in_a_style_scores_between(style: str) -> None:
    plain, half, full = (mean_style(blends(style, share), style) for share in (0, 0.5, 1))
    assert plain + 0.1 < half < full - 0.1


def test_likenesses_are_shares() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    even = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "white")]
    for image in (noise, *even, *shapes("neon", COUNT)):
        values = [subject_likeness(image, subject) for subject in SUBJECTS]
        values += [style_likeness(image, style) for style in STYLES]
        assert all(isinstance(value, float) and 0 <= value <= 1 for value in values)


def test_the_same_picture_scores_the_same_when_all_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "EXAMPLES", 2)
    first, second = likeness._fit.__wrapped__(), likeness._fit.__wrapped__()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_tables_of_the_measures_have_a_row_for_every_style(capsys: pytest.CaptureFixture[str]) -> None:
    program("evaluate").measures(1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [sum(row.startswith(f"| {style} |") for row in rows) for style in STYLES] == [2] * len(STYLES)
    assert len({row.count("|") for row in rows}) == 2 and "nan" not in " ".join(rows)
