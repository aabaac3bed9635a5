"""A contact sheet: rows of pictures with labels, as of the samples that a training draws on its way."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from klora.training.dataset import UNDECODABLE

# The sheet's measures in pixels: a picture's sides at least and at most, the height of letters (TEXT) and of
# lines (LEADING); and how many lines a text has at most.
LARGEST, SMALLEST, MARGIN, GAP, TEXT, LEADING, LABEL_WIDTH, LINES = 384, 192, 24, 16, 18, 23, 180, 3
ROWS, COLUMNS = 16, 16  # of samples at most, with which a sheet has at most 6,600 pixels a side

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet_of_samples(samples: Path, prompts: Sequence[str]) -> Image.Image:
    """The sheet of the samples in a folder, step_STEP_PROMPT.png: a row for each step that made some, ROWS of them at
    most, a column for each of the first COLUMNS prompts."""
    steps, prompts = sorted({path.stem.split("_")[1] for path in samples.glob("step_*.png")}), prompts[:COLUMNS]
    rows = [
        (f"step {int(step)}", [_thumbnail(samples / f"step_{step}_{number}.png") for number in range(len(prompts))])
        for step in _spread(steps, ROWS)
    ]
    return contact_sheet(rows, prompts)


def _spread(steps: Sequence[str], most: int) -> Sequence[str]:
    """At most so many (2 or more) of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def _thumbnail(path: Path) -> Image.Image | None:
    """A sample at its size on the sheet, its file closed; None where there is no such file, or, from resume_from, one
    that is no picture."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return fitted(picture)
    except (*UNDECODABLE, Image.DecompressionBombError):
        return None


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image | None]]], titles: Sequence[str]) -> Image.Image:
    """The sheet of rows (label, pictures), with a title above each column. A None leaves its cell empty."""
    font = ImageFont.load_default(TEXT)
    columns = max([len(titles), *(len(pictures) for _, pictures in rows)], default=0)
    grid = [[p and fitted(p) for p in [*pictures, *[None] * columns][:columns]] for _, pictures in rows]
    widths = [max([SMALLEST, *(picture.width for picture in column if picture)]) for column in zip(*grid, strict=True)]
    heights = [max([SMALLEST, *(picture.height for picture in row if picture)]) for row in grid]
    labels = [_wrapped(label, font, LABEL_WIDTH) for label, _ in rows]
    heads = [_wrapped(title, font, width) for title, width in zip(titles, widths, strict=False)]
    left = round(max((font.getlength(line) for label in labels for line in label), default=0))
    top = max(map(len, heads), default=0) * LEADING
    xs = list(accumulate((width + GAP for width in widths), initial=MARGIN + (left + GAP if left else 0)))
    ys = list(accumulate((height + GAP for height in heights), initial=MARGIN + (top + GAP // 2 if top else 0)))
    sheet = Image.new("RGB", (xs[-1] - GAP + MARGIN, ys[-1] - GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for head, x, width in zip(heads, xs, widths, strict=False):
        _write(draw, head, (x + width // 2, MARGIN + top - len(head) * LEADING), font, "ma")
    for label, row, y, height in zip(labels, grid, ys, heights, strict=False):
        _write(draw, label, (MARGIN, y + (height - len(label) * LEADING) // 2), font, "la")
        for picture, x, width in zip(row, xs, widths, strict=False):
            if picture:
                sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    return sheet


def fitted(picture: Image.Image) -> Image.Image:
    """A picture at its size on the sheet, RGB: a large one scaled to LARGEST, a small one by a whole factor to at least
    SMALLEST, so that its pixels stay squares."""
    side = max(picture.size)
    factor = -(-SMALLEST // side) if side <= LARGEST else LARGEST / side
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    resampling = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return picture.convert("RGB").resize(size, resampling)


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    """The text in at most LINES lines, each at most so many pixels wide; what is too long is cut, with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [*lines[: LINES - 1], " ".join(lines[LINES - 1 :])]
    return [_shortened(line, font, width) for line in kept if line]


def _shortened(line: str, font: _Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    end = bisect_left(range(len(line)), True, key=lambda end: font.getlength(f"{line[:end]}…") > width)
    return f"{line[: end - 1].rstrip()}…"


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: _Font, anchor: str) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * LEADING), line, "black", font, anchor)
