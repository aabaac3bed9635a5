"""Says what a drawing of one shape shows: shape, colour and ground. By geometry and nearest colours, not learnt.

Knows nothing of torch and of models, so that what models draw can be held against what was asked.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from examples.drawing import COLOURS, GROUNDS, SHAPES, Part, Scene, at_full_size, placed

FIGURE = 48  # distance of colours, of 255 a channel, at which a pixel is no ground
MASK_SIDE = 32  # cells to which figures are brought for comparison
TURNS = (-8, -4, 0, 4, 8)  # degrees, as far as scenes turn their shapes


class Verdict(NamedTuple):
    """What is seen. overlap: of the figure with the ideal shape, intersection over union, from 0 to 1."""

    shape: str
    colour: str
    ground: str
    overlap: float


def judged(image: Image.Image) -> Verdict:
    """The verdict on a picture in flat colours, RGB, square, of one shape on a ground."""
    pixels = np.asarray(at_full_size(image), dtype=float)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                             pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(border, axis=0)
    figure = _without_specks(np.abs(pixels - ground).max(axis=-1) > FIGURE)
    if figure.sum() < 9:
        return Verdict("", "", _nearest(ground, GROUNDS), 0.0)
    inner = figure & np.roll(figure, 1, 0) & np.roll(figure, -1, 0) & np.roll(figure, 1, 1) & np.roll(figure, -1, 1)
    colour = np.median(pixels[inner if inner.any() else figure], axis=0)
    seen = _framed(figure)
    overlaps = {shape: max(_overlap(seen, ideal) for ideal in _ideals(shape)) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return Verdict(shape, _nearest(colour, COLOURS), _nearest(ground, GROUNDS), overlaps[shape])


def _nearest(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.square(colour - names[name]).sum()))


def _without_specks(figure: np.ndarray) -> np.ndarray:
    """A pixel counts as most of the 5 x 5 around it do: one odd pixel in a corner would set the bounding box."""
    return np.asarray(Image.fromarray(255 * figure.astype(np.uint8)).filter(ImageFilter.MedianFilter(5))) > 127


def _framed(figure: np.ndarray) -> np.ndarray:
    """The figure's bounding box, brought to a square of MASK_SIDE cells; its proportions are kept."""
    rows, columns = (np.flatnonzero(figure.any(axis=axis)) for axis in (1, 0))
    box = figure[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(box.shape)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
    square[top : top + box.shape[0], left : left + box.shape[1]] = 255 * box
    image = Image.fromarray(square).resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127


@cache
def _ideals(shape: str) -> tuple[np.ndarray, ...]:
    """The shape as it should look, a little turned in either direction."""
    scenes = [
        Scene((Part(placed(SHAPES[shape], (0.5, 0.5), 0.5, turn), (0, 0, 0)),), (255, 255, 255)) for turn in TURNS
    ]
    figures = (np.asarray(scene.draw(), dtype=float).max(axis=-1) < 128 for scene in scenes)
    return tuple(_framed(_without_specks(figure)) for figure in figures)


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())
