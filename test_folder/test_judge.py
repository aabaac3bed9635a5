"""The judge of toy pictures is right about drawings, and about drawings that a model has blurred."""

import random
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples import drawing
from examples.drawing import COLOURS, GROUNDS, SHAPES, SIDE, Part, Scene
from examples.judge import judged


def alone(count: int) -> list[Scene]:
    """Plain scenes of one shape."""
    chance = random.Random(1)
    drawn = (drawing.random_scene(chance)[0] for _ in range(100 * count))
    return [scene for scene in drawn if len(scene.parts) == 1 and scene.style == "plain"][:count]


def right(scene: Scene, image: Image.Image) -> bool:
    return judged(image)[:3] == (scene.facts["shape"], scene.facts["colour"], scene.facts["ground"])


def test_drawings_are_recognised() -> None:
    scenes = alone(300)
    assert np.mean([right(scene, scene.draw()) for scene in scenes]) >= 0.99


def test_so_are_drawings_that_are_blurred_and_noisy() -> None:
    noise = np.random.default_rng(0)
    scenes, seen = alone(200), []
    for scene in scenes:
        pixels = np.asarray(scene.draw().filter(ImageFilter.GaussianBlur(0.8)), dtype=float)
        noisy = (pixels + noise.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        seen.append(right(scene, Image.fromarray(noisy)))
    assert np.mean(seen) >= 0.95


def test_odd_pixels_are_no_part_of_the_figure() -> None:
    """As a VAE leaves them in corners."""
    for scene in alone(20):
        image = scene.draw()
        for corner in ((0, 0), (SIDE - 1, 0), (40, SIDE - 1)):
            image.putpixel(corner, (255, 0, 255))
        assert judged(image) == judged(scene.draw())


def test_a_wrong_answer_is_not_accepted() -> None:
    """By chance one in 6 x 8 x 6 would be right."""
    scenes = alone(200)
    assert np.mean([right(scene, other.draw()) for scene, other in pairwise(scenes)]) < 0.05


def test_nothing_drawn_is_nothing_seen() -> None:
    assert judged(Image.new("RGB", (SIDE, SIDE), GROUNDS["beige"])) == ("", "", "beige", 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spoilt_shape_overlaps_less(shape: str) -> None:
    part = Part(drawing.placed(SHAPES[shape], (0.5, 0.5), 0.6), COLOURS["blue"])
    image = Scene((part,), GROUNDS["white"]).draw()
    whole = judged(image)
    image.paste(GROUNDS["white"], (SIDE // 2, 0, SIDE, SIDE))
    assert whole.shape == shape and whole.overlap > 0.85
    assert judged(image).overlap < whole.overlap or judged(image).shape != shape
