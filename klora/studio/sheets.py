"""Several ways to fuse one pair on one contact sheet, from one seed and the same latents; each LoRA that acts adds its
trigger to the prompt."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from klora.form.request import Request
from klora.fusion import Fusion, Schedule, style_share
from klora.generation import OnStep, Record

SWEEP = (0.5, 0.7, 1.0, 1.4, 2.0)  # of style_bias
LEGIBLE = 192  # pixels that a cell is wide at least; smaller images are enlarged by a whole number


@dataclass(frozen=True)
class Way:
    """One cell of a sheet: its label, and the request for its image.  style_share: in [0, 1]; None where K-LoRA has no
    choice.  decision: equal for two ways that come to the same image."""

    label: str
    request: Request
    style_share: float | None
    decision: Hashable

    @property
    def caption(self) -> str:
        """What stands below the label."""
        suffix = "" if self.request.image is None else " of the full schedule"
        return "" if self.style_share is None else f"style acts in {self.style_share:.0%}{suffix}"


def ways_of(request: Request, fusion: Fusion, steps: int) -> dict[str, list[Way]]:
    """{sheet's name: its cells} for the sheets of a request. fusion: of its two LoRAs; steps: of the full schedule."""
    bare = replace(request, report=False, compare=False, sweep=False)
    compared = {
        "content only": bare.without_choice("content"),
        "style only": bare.without_choice("style"),
        "sum of both": bare.without_choice("sum"),
        "K-LoRA s": replace(bare, pattern="s"),
        "K-LoRA s*": replace(bare, pattern="s*"),
    }
    swept = {f"style_bias {bias:g}": replace(bare, style_bias=bias) for bias in SWEEP}
    sheets = {"compare": compared, "sweep": swept}
    return {name: [_way(label, way, fusion, steps) for label, way in sheets[name].items()] for name in request.sheets}


def _way(label: str, request: Request, fusion: Fusion, steps: int) -> Way:
    if request.fusion != "klora":
        return Way(label, request, None, request.fusion)
    schedule = Schedule.from_pattern(request.pattern, request.alpha, request.beta)
    wins = fusion.content_wins(schedule, steps, request.style_bias)
    return Way(label, request, style_share(wins), wins.numpy().tobytes())


def draw_ways(
    ways: Sequence[Way], draw: Callable[[Request, OnStep], Image.Image], on_step: OnStep
) -> dict[Hashable, Image.Image]:
    """{decision: its image}, each drawn once. on_step(i, steps) is called with the steps of all images as one run."""
    requests = {way.decision: way.request for way in ways}

    def counted(done: int, step: int, steps: int) -> None:
        on_step(done * steps + step, len(requests) * steps)

    return {
        decision: draw(request, partial(counted, done)) for done, (decision, request) in enumerate(requests.items())
    }


def tallied(record: Record) -> Record:
    """A Record for each image of a sheet, which gives record the sheet's metrics: sums of seconds, the largest
    peak_bytes, and nothing that differs from image to image."""
    seconds, peak = defaultdict[str, float](float), 0

    def record_image(name: str, value: Any) -> None:
        nonlocal peak
        if name == "peak_bytes":
            value = peak = max(peak, value)
        if name.endswith("_seconds"):
            seconds[name] += value
            value = seconds[name]
        if name not in ("style_share", "flips", "flips_per_step"):
            record(name, value)

    return record_image


def contact_sheet(ways: Sequence[Way], images: Mapping[Hashable, Image.Image]) -> Image.Image:
    """The images in a row, each with its label and caption above it. A missing one leaves a blank cell that says so.

    images: by decision, all of one size, shown pixel for pixel, or enlarged by a whole number to LEGIBLE pixels.
    """
    width, height = next(iter(images.values())).size
    zoom = -(-LEGIBLE // width)
    width, height = width * zoom, height * zoom
    letter = max(13, width // 18)
    gap, top = letter // 2, 3 * letter + letter // 4
    sheet = Image.new("RGB", (len(ways) * (width + gap) + gap, height + top + gap), "white")
    drawn = ImageDraw.Draw(sheet)
    for place, way in enumerate(ways):
        left = gap + place * (width + gap)
        drawn.text((left, gap), way.label, "black", ImageFont.load_default(letter))
        caption = way.caption if way.decision in images else "withheld by the safety checker"
        drawn.text((left, gap + 1.4 * letter), caption, "dimgray", ImageFont.load_default(letter * 0.8))
        if image := images.get(way.decision):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return sheet
