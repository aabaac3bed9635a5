"""Measures how much a picture shows a subject, whatever its style, and how much it is in a style, whatever it shows.

Subjects are found by templates, styles are told by a kernel ridge regression on traits of the picture; both are made of
drawings, the same ones every time. Pictures are RGB, SIDE pixels square. Knows nothing of torch and of models.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from examples.drawing import GROUNDS, SIDE, STYLES, TILES, Scene, random_scene
from examples.figures import SUBJECTS, figure

CELLS = 32  # along a side, of the small pictures that templates are compared with
SIZES = (0.5, 0.56, 0.63, 0.7, 0.78, 0.86)  # of the picture's side; steps of one in nine
TURNS = (-14, -7, 0, 7, 14)  # degrees
MANNERS = ("plain", "outline", "pencil", "blueprint", "neon")  # pixel and mosaic are plain in 32 x 32 cells
FAINT = 0.12  # difference from the ground, of 1, that is taken off: noise and the tints of a mosaic's tiles
UNLIKE, ALIKE = 0.4, 0.85  # correlations that mean 0 and 1: what wrong drawings reach, and right ones in any style

SOFTENING = 0.7  # pixels; evens out the noise and the sharpness of pictures before their style is looked at
BANDS = (2, 4, 7, 11, 15, 18, 24, 30, 34, 46)  # cycles a side; 16 is a mosaic's tiles, 8 and its multiples a blueprint
EXAMPLES = 96  # drawings of each style that the regression is fitted to
WIDTH, RIDGE = 0.5, 0.003  # of the kernel, and of the regression


def subject_likeness(image: Image.Image, subject: str) -> float:
    """Measure how much a picture shows a subject at some place, 0.5 to 0.85 of the side in size, turned by up to 15°.

    Returns: the best correlation with a template, from UNLIKE to ALIKE brought to [0, 1].
    """
    pixels = _cells(image)
    ground = _ground(pixels)
    seen = pixels - ground
    strength = np.linalg.norm(seen, axis=-1, keepdims=True)
    spectrum = _edges(seen * np.clip(1 - FAINT / np.maximum(strength, FAINT), 0, 1))
    on_black, on_white = _templates(subject)
    templates = on_black + ground[:, None, None] * (on_white - on_black)  # a template is linear in its ground
    shared = (spectrum * templates.conj()).sum(axis=-3)
    overlaps = np.fft.ifft2(shared, norm="forward").real.max(axis=(-1, -2))  # over all places
    lengths = np.linalg.norm(templates.reshape(len(templates), -1), axis=-1) * max(np.linalg.norm(spectrum), 1e-3)
    return float(np.clip(((overlaps / lengths).max() - UNLIKE) / (ALIKE - UNLIKE), 0, 1))


@cache
def _templates(subject: str) -> tuple[np.ndarray, np.ndarray]:
    """Spectra of a subject less its ground in T manners, sizes and turns, on black and white, [T, 3, CELLS, CELLS]."""
    spectra = []
    for ground in ((0, 0, 0), (255, 255, 255)):
        for manner in MANNERS:
            for size in SIZES:
                parts = figure(subject, ((0.5, 0.5), size, 0.0, "white")).parts
                drawn = Scene(parts, ground, manner).draw()
                beside = drawn.getpixel((1, 1))
                turned = (drawn.rotate(-turn, Image.Resampling.BILINEAR, fillcolor=beside) for turn in TURNS)
                spectra += [_edges(_cells(picture) - np.float32(beside) / 255) for picture in turned]
    both = np.array(spectra).reshape(2, -1, 3, CELLS, CELLS)
    return both[0], both[1]


def _cells(image: Image.Image) -> np.ndarray:
    """A small picture, [CELLS, CELLS, 3], in [0, 1]."""
    return np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.float32) / 255


def _ground(pixels: np.ndarray) -> np.ndarray:
    """The median colour of a picture's border, [3]."""
    return np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)


def _edges(cells: np.ndarray) -> np.ndarray:
    """The spectrum of the Laplacian of Gaussian of each colour, [3, CELLS, CELLS]; its sigma is 1.5 cells."""
    frequency = np.fft.fftfreq(CELLS, 1 / CELLS).astype(np.float32)
    square = np.square(frequency) + np.square(frequency)[:, None]
    return np.fft.fft2(cells.transpose(2, 0, 1), norm="ortho") * square * np.exp(-square / 2 / 3.5**2)


# Styles.


def style_likeness(image: Image.Image, style: str) -> float:
    """Measure how much of a picture's looks is a style's, whatever is shown, in [0, 1]."""
    return style_likenesses(image)[style]


def style_likenesses(image: Image.Image) -> dict[str, float]:
    """The same of every style at once."""
    centre, spread, examples, weights, mean = _fit()
    shares = _kernel((_traits(image) - centre) / spread, examples) @ weights + mean
    return dict(zip(STYLES, np.clip(shares, 0, 1).tolist(), strict=True))


@cache
def _fit() -> tuple[np.ndarray, ...]:
    """Centre and spread of traits, the examples' traits, weights of the examples for each style, and its mean share."""
    traits, shares = (np.array(column) for column in zip(*_examples(), strict=True))
    centre, spread = traits.mean(axis=0), (traits.std(axis=0) + 0.01 * traits.std()) * traits.shape[1] ** 0.5
    examples, mean = (traits - centre) / spread, shares.mean(axis=0)
    weights = np.linalg.solve(_kernel(examples, examples) + RIDGE * np.eye(len(examples)), shares - mean)
    return centre, spread, examples, weights, mean


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """exp(-WIDTH |a - b|²), of each row of both."""
    distance = np.square(first).sum(-1)[..., None] + np.square(second).sum(-1) - 2 * first @ second.T
    return np.exp(-WIDTH * distance)


def _examples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Traits and shares of styles of drawings: of scenes, figures and nothing, crisp and soft, some half plain."""
    chance, noise, one = random.Random(0), np.random.default_rng(0), np.eye(len(STYLES))
    for index, style in enumerate(STYLES):
        for number in range(EXAMPLES):
            scene = random_scene(chance)[0] if number % 2 else _posed(chance)
            scene = replace(scene, style=style, parts=scene.parts if number % 12 else ())
            image, share = scene.draw(number), chance.random() if number % 4 == 3 else 1.0
            if share < 1:
                image = Image.blend(replace(scene, style="plain").draw(), image, share)
            shares = share * one[index] + (1 - share) * one[list(STYLES).index("plain")]
            yield _traits(_softened(image, chance, noise)), shares


def _posed(chance: random.Random) -> Scene:
    centre = (chance.uniform(0.38, 0.62), chance.uniform(0.38, 0.62))
    pose = (centre, chance.uniform(0.5, 0.85), chance.uniform(-15, 15), chance.choice(list(GROUNDS)))
    return figure(chance.choice(list(SUBJECTS)), pose)


def _softened(image: Image.Image, chance: random.Random, noise: np.random.Generator) -> Image.Image:
    """The picture as a model might draw it: blurred, noisy, its colours a little off; more so or less."""
    amount = max(0.0, chance.uniform(-0.4, 1.1))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5 * amount)), dtype=float)
    pixels = pixels + noise.normal(0, 10 * amount, pixels.shape) + noise.uniform(-15, 15, 3) * amount
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _traits(image: Image.Image) -> np.ndarray:
    """What tells styles: colours, spectrum, where edges lie in tiles, how thick things are."""
    image = image.filter(ImageFilter.GaussianBlur(SOFTENING))
    pixels = np.asarray(image, dtype=float) / 255
    small = np.asarray(image.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX), dtype=float) / 255
    return np.concatenate([_colours(small), _bands(pixels.mean(axis=-1)), _edges_in_tiles(pixels), _thickness(small)])


def _colours(pixels: np.ndarray) -> np.ndarray:
    """The root of a histogram with 4 bins a channel, each pixel shared among its neighbouring bins, [64]."""
    shares = np.clip(1 - np.abs(3 * pixels.reshape(-1, 3, 1) - np.arange(4)), 0, None)  # [pixel, channel, bin]
    red_green = shares[:, 0, :, None] * shares[:, 1, None]
    return np.sqrt((red_green.reshape(-1, 16).T @ shares[:, 2]).ravel() / len(shares))


def _bands(light: np.ndarray) -> np.ndarray:
    """Log power of the lightness in each of BANDS, [9]."""
    window, frequency = np.hanning(SIDE), np.fft.fftfreq(SIDE, 1 / SIDE)
    power = np.square(np.abs(np.fft.fft2((light - light.mean()) * window * window[:, None], norm="ortho")))
    band = np.digitize(np.hypot(frequency, frequency[:, None]).ravel(), BANDS)
    means = np.bincount(band, power.ravel())[1:-1] / np.bincount(band)[1:-1]
    return np.log(means + 1e-3) / 5


def _edges_in_tiles(pixels: np.ndarray) -> np.ndarray:
    """Log energy of the differences of neighbours at each place in a tile, down and across, [2 x SIDE / TILES]."""
    profiles = []
    for axis in (0, 1):
        energy = np.square(np.diff(pixels, axis=axis, prepend=np.take(pixels, [0], axis))).sum(axis=-1)
        energy = np.clip(energy - 4 * np.median(energy), 0, None)  # less noise, which is everywhere
        profiles.append(energy.mean(axis=1 - axis).reshape(TILES, -1).mean(axis=0))
    return np.log(np.concatenate(profiles) + 3e-5) / 5


def _thickness(pixels: np.ndarray) -> np.ndarray:
    """How much differs from the ground, and how much of it is left when that is thinned by 2, 4 and 6 pixels, [4]."""
    differs = np.abs(pixels - _ground(pixels)).max(axis=-1)
    image, left = Image.fromarray((255 * differs).astype(np.uint8)), list[float]()
    for _ in range(3):  # a least of leasts, for which a filter of 5 or 7 pixels takes far longer
        image = image.filter(ImageFilter.MinFilter(3))
        left.append(np.asarray(image).mean() / 255)
    return np.array([differs.mean(), *(rest / (differs.mean() + 0.01) for rest in left)])
