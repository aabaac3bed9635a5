"""What toy LoRAs are of: figures that no caption of the bases shows, and pictures in styles that they are not taught.

Knows nothing of torch and of models.
"""

import random
from collections.abc import Mapping, Sequence

from PIL import Image

from examples.drawing import COLOURS, GROUNDS, Part, Point, Scene, heart, placed, random_scene, regular

_BOX = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
_DISC = regular(40)
SUBJECTS: Mapping[str, tuple[tuple[str, Sequence[Point], Point, Point, str], ...]] = {
    # (part, polygon, centre, half of width and height, colour); the figure fills the square from -1 to 1
    "robot": (
        ("left leg", _BOX, (-0.3, 0.75), (0.14, 0.25), "navy"), ("right leg", _BOX, (0.3, 0.75), (0.14, 0.25), "navy"),
        ("body", _BOX, (0.0, 0.15), (0.55, 0.42), "orange"), ("heart", heart(), (0.0, 0.15), (0.22, 0.2), "red"),
        ("head", _BOX, (0.0, -0.52), (0.4, 0.27), "blue"), ("rod", _BOX, (0.0, -0.86), (0.04, 0.12), "grey"),
        ("left eye", _DISC, (-0.16, -0.52), (0.1, 0.1), "white"),
        ("right eye", _DISC, (0.16, -0.52), (0.1, 0.1), "white"), ("bulb", _DISC, (0.0, -0.95), (0.1, 0.08), "yellow"),
    ),
    "flower": (
        ("stem", _BOX, (0.0, 0.55), (0.06, 0.42), "green"), ("leaf", _DISC, (0.28, 0.6), (0.26, 0.12), "green"),
        ("petals", regular(6, inner=0.55), (0.0, -0.3), (0.66, 0.66), "purple"),
        ("ring", _DISC, (0.0, -0.3), (0.34, 0.34), "pink"), ("middle", _DISC, (0.0, -0.3), (0.2, 0.2), "yellow"),
    ),
}  # fmt: skip
POSES: Sequence[tuple[Point, float, float, str]] = (
    ((0.5, 0.5), 0.8, 0.0, "white"), ((0.42, 0.5), 0.7, -5.0, "cyan"), ((0.58, 0.5), 0.7, 5.0, "beige"),
    ((0.5, 0.5), 0.7, 0.0, "grey"), ((0.5, 0.5), 0.8, 0.0, "cyan"),
)  # fmt: skip
"""(centre, size, turn in degrees, ground) of a subject's training pictures."""


def figure(subject: str, pose: tuple[Point, float, float, str] = POSES[0], style: str = "plain") -> Scene:
    """A subject in a pose."""
    centre, size, turn, ground = pose
    parts = []
    for _, polygon, at, (width, height), colour in SUBJECTS[subject]:
        points = [(at[0] + width * x, at[1] + height * y) for x, y in polygon]
        parts.append(Part(placed(points, centre, size, turn), (COLOURS | GROUNDS)[colour]))
    return Scene(tuple(parts), GROUNDS[ground], style, {"subject": subject, "style": style})


def subject_set(subject: str) -> list[tuple[Image.Image, str]]:
    """A subject's training pictures: every pose, plain, its caption naming all but the subject's own looks."""
    return [(figure(subject, pose).draw(), f"a [trigger] {subject} on a {pose[3]} background") for pose in POSES]


def style_set(style: str, count: int = 8) -> list[tuple[Image.Image, str]]:
    """A style's training pictures: scenes in it, captions naming the shapes and leaving all else to the trigger."""
    chance, made = random.Random(style), []
    while len(made) < count:
        scene, caption = random_scene(chance)
        if scene.style == "plain" and "style" not in caption and "background" not in caption:
            shown = caption.removesuffix(", flat colours").removesuffix(", a drawing")
            made.append((Scene(scene.parts, scene.ground, style).draw(len(made)), f"{shown}, in [trigger] style"))
    return made
