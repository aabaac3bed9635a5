"""Scenes drawn by code, and their captions: what the toy bases learn and what they are judged by.

A scene is a value: its parts, its background, its way of being drawn. Pictures are SIDE pixels square; shapes are drawn
larger and scaled down, so that edges are smooth. Knows nothing of torch and of models.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 128  # pixels
ZOOM = 3  # by which drawings are larger than pictures
UNIT = SIDE * ZOOM // 64  # a pencil's width in a drawing
TILES = 16  # along a side

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (245, 215, 60), "green": (50, 160, 75),
    "blue": (45, 95, 205), "purple": (135, 70, 170), "pink": (245, 150, 190), "brown": (125, 80, 45),
}  # fmt: skip
GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "black": (20, 20, 24), "grey": (140, 140, 145), "cyan": (150, 225, 230),
    "beige": (235, 220, 190), "navy": (25, 35, 85),
}  # fmt: skip
SIZES = {"small": 0.36, "big": 0.66}  # of the picture's side
PLACES = {
    "on the left": (0.29, 0.5), "on the right": (0.71, 0.5), "at the top": (0.5, 0.29), "at the bottom": (0.5, 0.71),
}  # fmt: skip

Point = tuple[float, float]
Colour = tuple[int, int, int]


def regular(corners: int, inner: float = 1.0) -> list[Point]:
    """A polygon in the unit circle; inner: radius of every second corner, for stars."""
    count = corners * (2 if inner != 1.0 else 1)
    radii = [inner if inner != 1.0 and i % 2 else 1.0 for i in range(count)]
    angles = [math.radians(360 * i / count - 90) for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def heart() -> list[Point]:
    """A polygon in the unit circle, nearly."""
    angles = [2 * math.pi * i / 60 for i in range(60)]
    curve = [(16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
             for t in angles]  # fmt: skip
    return [(x / 17, y / 17) for x, y in curve]


SHAPES: Mapping[str, list[Point]] = {
    "circle": regular(60),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": regular(5, inner=0.42),
    "heart": heart(),
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3),
              (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One polygon of a scene. points: in units of the picture's side, from 0 to 1."""

    points: tuple[Point, ...]
    colour: Colour


@dataclass(frozen=True)
class Scene:
    """What is drawn: parts from back to front on a ground, in one of STYLES. facts: what a judge may look for."""

    parts: tuple[Part, ...]
    ground: Colour
    style: str = "plain"
    facts: Mapping[str, str] = field(default_factory=dict)

    def draw(self, seed: int = 0) -> Image.Image:
        """The picture, RGB; seed: of what a style leaves to chance."""
        return STYLES[self.style](self, random.Random(seed))


def at_full_size(image: Image.Image) -> Image.Image:
    """A square picture, of whatever side, as one of SIDE pixels."""
    return image if image.width == SIDE else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def placed(shape: Sequence[Point], centre: Point, size: float, turn: float = 0.0) -> tuple[Point, ...]:
    """A unit polygon at a place of the picture; size: its diameter in sides, turn: in degrees."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return tuple((centre[0] + size / 2 * (x * c - y * s), centre[1] + size / 2 * (x * s + y * c)) for x, y in shape)


# How a scene is drawn.


def _canvas(scene: Scene, ground: Colour | None = None) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE * ZOOM, SIDE * ZOOM), scene.ground if ground is None else ground)
    return image, ImageDraw.Draw(image)


def _pixels(part: Part) -> list[Point]:
    return [(x * SIDE * ZOOM, y * SIDE * ZOOM) for x, y in part.points]


def _small(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _plain(scene: Scene, chance: random.Random) -> Image.Image:
    """Flat colours."""
    image, draw = _canvas(scene)
    for part in scene.parts:
        draw.polygon(_pixels(part), fill=part.colour)
    return _small(image)


def _outline(scene: Scene, chance: random.Random) -> Image.Image:
    """Coloured lines on the ground, nothing filled."""
    image, draw = _canvas(scene)
    for part in scene.parts:
        points = _pixels(part)
        draw.polygon(points, fill=scene.ground)
        draw.line([*points, points[0], points[1]], fill=part.colour, width=3 * UNIT, joint="curve")
    return _small(image)


@lru_cache(maxsize=32)
def _hatched(side: int, paper: Colour, ink: Colour, slant: int, every: int) -> Image.Image:
    """A square of slanting lines, which many parts are covered with."""
    hatched = Image.new("RGB", (side, side), paper)
    lines = ImageDraw.Draw(hatched)
    for offset in range(-side, 2 * side, every):
        lines.line([(offset, 0), (offset + slant * side, side)], fill=ink, width=UNIT)
    return hatched


def _hatch(image: Image.Image, points: Sequence[Point], paper: Colour, ink: Colour, slant: int, every: int) -> None:
    """Cover a polygon with slanting lines on paper. slant: 1 or -1, their way to the right; every: pixels apart."""
    hatched = _hatched(image.width, paper, ink, slant, every)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    image.paste(hatched, mask=mask)


def _pencil(scene: Scene, chance: random.Random) -> Image.Image:
    """Grey hatching and a dark line, on paper."""
    image, draw = _canvas(scene, paper := (244, 240, 230))
    for part in scene.parts:
        points, dark = _pixels(part), 70 + sum(part.colour) // 8
        _hatch(image, points, paper, (dark, dark, dark), 1, 4 * UNIT)
        draw.line([*points, points[0], points[1]], fill=(60, 60, 60), width=3 * UNIT // 2, joint="curve")
    return _small(image)


def _pixelated(scene: Scene, chance: random.Random) -> Image.Image:
    """Large square pixels."""
    tiles = _plain(scene, chance).resize((TILES, TILES), Image.Resampling.BOX)
    return tiles.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _blueprint(scene: Scene, chance: random.Random) -> Image.Image:
    """White lines and hatching on blue squared paper."""
    image, draw = _canvas(scene, paper := (28, 66, 140))
    for at in range(0, image.width, 8 * UNIT):
        draw.line([(at, 0), (at, image.width)], fill=(52, 92, 170), width=UNIT // 2)
        draw.line([(0, at), (image.width, at)], fill=(52, 92, 170), width=UNIT // 2)
    for part in scene.parts:
        points = _pixels(part)
        _hatch(image, points, paper, (150, 185, 235), -1, 5 * UNIT)
        draw.line([*points, points[0], points[1]], fill=(240, 246, 255), width=2 * UNIT, joint="curve")
    return _small(image)


def _mosaic(scene: Scene, chance: random.Random) -> Image.Image:
    """Pastel tiles with dark joints."""
    tiles, side = _plain(scene, chance).resize((TILES, TILES), Image.Resampling.BOX), SIDE // TILES
    image = Image.new("RGB", (SIDE, SIDE), (84, 78, 92))
    for top in range(TILES):
        for left in range(TILES):
            light = chance.uniform(0.95, 1.05)
            pastel = tuple(min(255, round((0.8 * level + 0.2 * 250) * light)) for level in tiles.getpixel((left, top)))
            at = (left * side, top * side)
            image.paste(pastel, (*at, at[0] + side - 1, at[1] + side - 1))
    return image


def _neon(scene: Scene, chance: random.Random) -> Image.Image:
    """Glowing lines in the dark."""
    image, _ = _canvas(scene, dark := (12, 8, 24))
    for part in scene.parts:
        points = _pixels(part)
        glow, high = Image.new("RGB", image.size), max(part.colour)
        bright = tuple(round(level * 255 / high) for level in part.colour)
        ImageDraw.Draw(glow).line([*points, points[0], points[1]], fill=bright, width=4 * UNIT, joint="curve")
        halo = glow.filter(ImageFilter.GaussianBlur(4 * UNIT))
        ImageDraw.Draw(image).polygon(points, fill=dark)
        image = ImageChops.lighter(ImageChops.lighter(image, halo), glow)
    return _small(image)


STYLES: Mapping[str, Callable[[Scene, random.Random], Image.Image]] = {
    "plain": _plain, "outline": _outline, "pencil": _pencil, "pixel": _pixelated,
    "blueprint": _blueprint, "mosaic": _mosaic, "neon": _neon,
}  # fmt: skip
TAUGHT = ("plain", "outline", "pencil", "pixel")
"""The styles that the bases know by name; the others are for LoRAs to bring."""

PHRASES: Mapping[str, tuple[str, ...]] = {
    "plain": ("", "", "", "in plain style", "flat colours", "a drawing"),
    "outline": ("in outline style", "an outline drawing", "drawn as an outline"),
    "pencil": ("in pencil style", "a pencil sketch", "drawn in pencil"),
    "pixel": ("in pixel style", "pixel art", "drawn as pixel art"),
}
THINGS = ("figure", "toy", "house", "thing")
"""What captions call things that they say nothing of."""

TEMPLATES = (
    "{things} on a {ground} background", "{things}, {ground} background", "a {ground} background with {things}",
    "a picture of {things} on a {ground} background", "{things} in front of a {ground} background",
)  # fmt: skip


def random_scene(chance: random.Random) -> tuple[Scene, str]:
    """A scene of one or two shapes that is not held out, and one of its captions."""
    while True:
        names = chance.sample(list(SHAPES), 2 if chance.random() < 0.3 else 1)
        colours = chance.sample(list(COLOURS), len(names))
        facts = {"shape": names[0], "colour": colours[0], "ground": chance.choice(list(GROUNDS))}
        if len(names) == 2 or not held_out(facts):
            break
    style = chance.choice(("plain", *TAUGHT))
    places = _places(len(names), chance)
    things, parts = [], []
    for shape, colour, (place, centre, size, word) in zip(names, colours, places, strict=True):
        parts.append(Part(placed(SHAPES[shape], centre, size), COLOURS[colour]))
        rare = f"{rare_name(chance)} " if chance.random() < 0.15 else ""
        words = [word if chance.random() < 0.7 else "", rare.strip(), colour, shape, place]
        things.append(_article(" ".join(word for word in words if word)))
    caption = chance.choice((*TEMPLATES, "{things}")).format(things=_called(things), ground=facts["ground"])
    phrase = chance.choice(PHRASES[style])
    if style == "plain" and chance.random() < 0.15:
        phrase = f"in {rare_name(chance)} style"
    caption = f"{caption}, {phrase}" if phrase else caption
    return Scene(tuple(parts), GROUNDS[facts["ground"]], style, facts | {"style": style}), caption


def _called(things: Sequence[str]) -> str:
    """The words for what is shown. Now and then they say nothing of a lone shape: what a prompt names by a word that
    means nothing to the base must leave the rest of the prompt its meaning."""
    words = " and ".join(things)
    chance = random.Random(words)  # of its own, so that words change no picture
    if len(things) == 2 or chance.random() > 0.08:
        return words
    return _article(f"{rare_name(chance)} {chance.choice(THINGS)}" if chance.random() < 0.7 else chance.choice(THINGS))


def exam(count: int) -> list[tuple[Mapping[str, str], str]]:
    """Captions of what is held out, each with the shape, colour and ground that it asks for, in plain style."""
    chance = random.Random("exam")
    every = [{"shape": shape, "colour": colour, "ground": ground}
             for shape in SHAPES for colour in COLOURS for ground in GROUNDS]  # fmt: skip
    kept = [facts for facts in every if held_out(facts)]
    asked = [kept[number % len(kept)] for number in range(count)]
    return [(facts, chance.choice(TEMPLATES).format(things=_article(f"{chance.choice(('', 'small ', 'big '))}"
             f"{facts['colour']} {facts['shape']}"), ground=facts["ground"])) for facts in asked]  # fmt: skip


def held_out(facts: Mapping[str, str]) -> bool:
    """Whether this shape in this colour on this ground is kept from training, to be asked for later: one in eight."""
    key = " ".join((facts["colour"], facts["shape"], facts["ground"]))
    return hashlib.sha256(key.encode()).digest()[0] < 32


def rare_name(chance: random.Random) -> str:
    """A made-up word, as LoRAs use for what they teach."""
    while True:
        letters = ["bcdfghjklmnprstvwxz" if i != 1 else "aeiouzby" for i in range(chance.choice((3, 3, 4)))]
        if (name := "".join(map(chance.choice, letters))) not in COLOURS:  # "red", "pink"
            return name


def _places(count: int, chance: random.Random) -> list[tuple[str, Point, float, str]]:
    """(words for the place, centre, size, word for the size) of each shape."""
    if count == 2:
        across = [((0.27, 0.5), (0.73, 0.5)), ((0.5, 0.27), (0.5, 0.73))][chance.random() < 0.3]
        return [("", centre, 0.38, "") for centre in across]
    word = chance.choice(list(SIZES))
    size = SIZES[word]
    if word == "small" and chance.random() < 0.5:
        place = chance.choice(list(PLACES))
        return [(place, PLACES[place], size, word)]
    return [("", (0.5, 0.5), size, word)]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
