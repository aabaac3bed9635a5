"""Figures of several parts: any, as the bases see them, and those that toy LoRAs are of; the LoRAs' training pictures.

Knows nothing of torch and of models.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from examples.drawing import (
    COLOURS,
    GROUNDS,
    PHRASES,
    SHAPES,
    TAUGHT,
    TEMPLATES,
    THINGS,
    Part,
    Point,
    Scene,
    heart,
    placed,
    random_scene,
    rare_name,
    regular,
)  # fmt: skip

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
    *place, ground = pose
    parts = _assembled([part for _, *part in SUBJECTS[subject]], *place)
    return Scene(parts, GROUNDS[ground], style, {"subject": subject, "style": style})


def random_figure(chance: random.Random, looks: random.Random | None = None) -> tuple[Scene, str]:
    """A figure that never was, in a style that bases are taught, and a caption which says no more of it than a name.

    So a LoRA's subject is nothing strange to a base, and one that is half drawn is finished as it was begun.  looks:
    decides, in the place of chance, which figure it is, that of another picture in another pose, place and style.
    """
    looks = looks or chance
    bodies, paints = (_BOX, _DISC, *SHAPES.values()), list(COLOURS | GROUNDS)
    parts = [(looks.choice(bodies), (0.0, 0.2), (looks.uniform(0.3, 0.6), looks.uniform(0.3, 0.5))),
             (looks.choice(bodies), (0.0, -0.5), (looks.uniform(0.25, 0.6), looks.uniform(0.2, 0.4)))]  # fmt: skip
    for _ in range(looks.randint(1, 3)):
        detail, at = looks.choice(bodies), (looks.choice((0.0, 0.2, 0.35)), looks.uniform(-0.8, 0.8))
        size = (looks.uniform(0.08, 0.25), looks.uniform(0.08, 0.25))
        parts += [(detail, (side * at[0], at[1]), size) for side in (-1, 1)[: 2 if at[0] else 1]]
    named = [(*part, looks.choice(paints)) for part in parts]
    pose = ((chance.uniform(0.42, 0.58), 0.5), chance.uniform(0.75, 0.95), chance.uniform(-6, 6))
    return _captioned(_assembled(named, *pose), f"{rare_name(looks)} {looks.choice(THINGS)}", chance)


def kin(subject: str, chance: random.Random) -> tuple[Scene, str]:
    """Another of the subject's kind, in a style that bases are taught, and a caption that says which kind.

    Parts are about where the subject's are, in other colours and proportions, and often of other forms. So a base knows
    what a robot is before a LoRA says which, as published ones know dogs.
    """
    named, alike = [], dict[Point, tuple[Any, ...]]()  # by the size of the subject's own, so that pairs stay pairs
    for _, own, at, (width, height), colour in SUBJECTS[subject]:
        form = chance.choice((_BOX, _DISC, *SHAPES.values())) if chance.random() < 0.4 else own
        size = (width * 1.5 ** chance.uniform(-1, 1), height * 1.5 ** chance.uniform(-1, 1))
        shift = (chance.uniform(-0.1, 0.1), chance.uniform(-0.1, 0.1))
        paint = chance.choice([paint for paint in COLOURS | GROUNDS if paint != colour])
        form, shift, *looks = alike.setdefault((width, height), (form, shift, size, paint))
        named.append((form, (at[0] + (shift[0] if at[0] > 0 else -shift[0]), at[1] + shift[1]), *looks))
    pose = ((chance.uniform(0.44, 0.56), 0.5), chance.uniform(0.65, 0.85), chance.uniform(-6, 6))
    name = f"{rare_name(chance)} {subject}" if chance.random() < 0.5 else subject
    return _captioned(_assembled(named, *pose), name, chance)


def _captioned(parts: tuple[Part, ...], name: str, chance: random.Random) -> tuple[Scene, str]:
    """Parts on some ground in a style that bases are taught, and a caption that calls them by a name alone."""
    ground, style = chance.choice(list(GROUNDS)), chance.choice(("plain", *TAUGHT))
    caption = chance.choice((*TEMPLATES, "{things}")).format(things=f"a {name}", ground=ground)
    phrase = chance.choice(PHRASES[style])
    scene = Scene(parts, GROUNDS[ground], style, {"ground": ground, "style": style})
    return scene, f"{caption}, {phrase}" if phrase else caption


def subject_set(subject: str) -> list[tuple[Image.Image, str]]:
    """A subject's training pictures: every pose, plain, its caption naming all but the subject's own looks."""
    return [(figure(subject, pose).draw(), f"a [trigger] {subject} on a {pose[3]} background") for pose in POSES]


def style_set(style: str) -> list[tuple[Image.Image, str]]:
    """A style's eight training pictures: scenes and subjects' kin in turn, captions leaving looks to the trigger."""
    chance, made = random.Random(style), []
    kinds = [kind for subject in SUBJECTS for kind in (random_scene, partial(kin, subject))]
    while len(made) < 8:
        scene, caption = kinds[len(made) % len(kinds)](chance)
        if scene.style == "plain" and "style" not in caption and "background" not in caption:
            shown = caption.removesuffix(", flat colours").removesuffix(", a drawing")
            made.append((Scene(scene.parts, scene.ground, style).draw(len(made)), f"{shown}, in [trigger] style"))
    return made


def _assembled(parts: Iterable[Any], centre: Point, size: float, turn: float) -> tuple[Part, ...]:
    """Parts as SUBJECTS has them, but for their names, in a pose."""
    made = []
    for polygon, at, (width, height), colour in parts:
        points = [(at[0] + width * x, at[1] + height * y) for x, y in polygon]
        made.append(Part(placed(points, centre, size, turn), (COLOURS | GROUNDS)[colour]))
    return tuple(made)
