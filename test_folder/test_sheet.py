"""The contact sheet, probed by the places of its colours."""

import os
import resource
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageColor, ImageFont

from klora.training import sheet as sheets

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")
PLAIN = partial(Image.new, "RGB")


def boxes(sheet: Image.Image) -> dict[str, tuple[int, ...]]:
    pixels = numpy.asarray(sheet)
    places = {colour: (pixels == ImageColor.getrgb(colour)).all(-1).nonzero() for colour in COLOURS}
    return {name: (min(x), min(y), max(x) + 1, max(y) + 1) for name, (y, x) in places.items() if len(x)}


def darkest(sheet: Image.Image, *box: int) -> int:
    return sheet.convert("L").crop(box).getextrema()[0]


def test_every_picture_has_its_shape_and_its_place_within_even_margins() -> None:
    shapes = ((512, 512), (512, 256), (64, 64), (40, 64), (300, 200), (256, 1024))
    pictures = [PLAIN(shape, colour) for colour, shape in zip(COLOURS, shapes, strict=True)]
    sheet = sheets.contact_sheet([("step 1", pictures[:3]), ("step 2", pictures[3:])], ["a", "b", "c"])
    found = [boxes(sheet)[colour] for colour in COLOURS]
    sizes = [(384, 384), (384, 192), (192, 192), (120, 192), (300, 200), (96, 384)]
    assert [(box[2] - box[0], box[3] - box[1]) for box in found] == sizes
    assert all(left[2] < right[0] for row in (found[:3], found[3:]) for left, right in pairwise(row))
    assert all(above[3] < below[1] for above in found[:3] for below in found[3:])
    assert all(abs(found[at][0] + found[at][2] - found[at + 3][0] - found[at + 3][2]) <= 2 for at in range(3))
    (width, height), edge = sheet.size, sheets.MARGIN
    assert (width - max(box[2] for box in found), height - max(box[3] for box in found)) == (edge, edge)
    assert darkest(sheet, 0, 0, width, edge) == darkest(sheet, 0, 0, edge, height) == 255


def test_a_tiny_picture_is_enlarged_by_a_whole_factor_with_its_pixels_kept() -> None:
    board = PLAIN((100, 100), "blue")
    board.paste("red", (0, 0, 1, 1))
    edge, found = sheets.MARGIN, boxes(sheets.contact_sheet([("", [board])], [""]))
    assert found == {"blue": (edge, edge, edge + 200, edge + 200), "red": (edge, edge, edge + 2, edge + 2)}


def test_a_thin_picture_is_never_made_of_no_width_and_a_grey_one_is_rgb() -> None:
    thin = sheets.fitted(Image.new("L", (1, 1000)))
    assert (thin.mode, thin.size) == ("RGB", (1, sheets.LARGEST))


def test_a_large_picture_is_made_small_without_losing_every_other_line() -> None:
    stripes = Image.fromarray(numpy.tile(numpy.uint8([0, 255]), (768, 384)))
    assert all(100 < level < 156 for level in sheets.fitted(stripes).getpixel((200, 200)))


def test_a_missing_picture_leaves_its_cell_white_and_its_place_taken() -> None:
    first, second, third = (PLAIN((200, 200), colour) for colour in COLOURS[:3])
    sheet = sheets.contact_sheet([("1", [first, None]), ("2", [second, third]), ("3", [])], ["a", "b"])
    red, blue = boxes(sheet)["red"], boxes(sheet)["blue"]
    assert darkest(sheet, blue[0], red[1], sheet.width, red[3]) == 255
    assert darkest(sheet, red[0], blue[3], *sheet.size) == 255
    assert sheet.height - blue[3] >= sheets.MARGIN + sheets.SMALLEST


@pytest.mark.parametrize("title", ["dog", "a sbu dog in a bucket " * 20, "x" * 5000])
def test_titles_stay_above_their_column_and_labels_left_of_their_row(title: str) -> None:
    sheet = sheets.contact_sheet([(title, [PLAIN((192, 192), "red"), PLAIN((192, 192), "blue")])], [title, ""])
    red, blue = boxes(sheet)["red"], boxes(sheet)["blue"]
    assert darkest(sheet, red[0], 0, red[2], red[1]) < 64
    assert darkest(sheet, 0, red[1], red[0], red[3]) < 64
    assert darkest(sheet, blue[0], 0, blue[2], blue[1]) == 255  # it has no title
    assert darkest(sheet, red[0] - sheets.GAP + 2, 0, red[0] - 1, sheet.height) == 255
    assert red[1] <= sheets.MARGIN + sheets.LINES * sheets.LEADING + sheets.GAP


def test_a_title_that_does_not_fit_ends_in_an_ellipsis() -> None:
    lines = sheets._wrapped("a sbu dog in a bucket " * 20, font := ImageFont.load_default(sheets.TEXT), 200)
    assert (len(lines), lines[0], lines[-1][-1]) == (sheets.LINES, "a sbu dog in a bucket a", "…")
    assert 180 < font.getlength(lines[-1]) <= 200


@pytest.fixture
def few_files() -> Iterator[None]:
    """A process that may open four files more than it has: none gets a number from the limit on."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 4, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_a_sheet_of_many_samples_shows_few_steps_and_opens_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "ROWS", 7)
    monkeypatch.setattr(sheets, "COLUMNS", 2)
    for step in range(10, 410, 10):
        Image.new("RGB", (24, 24), (step // 2, 0, 255)).save(tmp_path / f"step_{step:06}_0.png")
    Image.new("RGB", (800, 400), (205, 0, 255)).save(tmp_path / "step_000410_0.png")
    sheet = sheets.sheet_of_samples(tmp_path, ["sbu"] * 4)
    dots = numpy.asarray(sheet)[::9, ::9].reshape(-1, 3)
    shown = dict.fromkeys(int(red) * 2 for red, *others in dots if others == [0, 255])
    assert list(shown) == [10, 80, 140, 210, 280, 340, 410]
    assert sheet.width < 384 + 192 + 180


def test_a_sheet_opens_no_sample_in_another_format_than_ours(tmp_path: Path) -> None:
    """An EPS in a tar that is taken up would be run, by Ghostscript."""
    Image.new("RGB", (64, 64)).save(tmp_path / "ours.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png", "BMP")
    assert (
        sheets._thumbnail(tmp_path / "ours.png").size == (192, 192)
        and sheets._thumbnail(tmp_path / "other.png") is None
    )
