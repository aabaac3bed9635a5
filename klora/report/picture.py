"""A report to look at: who acts where and when, how much of it is style, and why.   L layers, T steps.

matplotlib is imported when the first picture is drawn, by its object API alone: no pyplot, no state between pictures.
"""

import io
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from klora.report.numbers import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which people with any colour vision tell apart, and a grey that is lighter than both
CONTENT, STYLE, ALONE = "#0072B2", "#E69F00", "#BBBBBB"
INK, FAINT = "#222222", "#888888"
WIDTH = 1280  # pixels
DPI = 100
_MARGINS = {"top": 104, "bottom": 52, "right": 24, "gap": 48, "side": 300, "curve": 150}  # pixels
_LABEL = 13  # pixels that a block's name takes

_BLOCK = re.compile(r"((?:[a-z]+_)*blocks?|[^.]+)(?:[._](\d+))?")


def draw(report: Report) -> bytes:
    """The figure as a PNG of 1280 pixels in width, and of 700 to 1700 in height as there are layers."""
    file = io.BytesIO()
    figure(report).savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def figure(report: Report) -> "Figure":
    """The heat map of steps and layers, style's share of each step below it, at its side the layers' R and the slider:
    the four axes in this order."""
    height = min(1400, max(420, math.ceil(1.25 * len(report.layers))))
    blocks = _blocks(report.layers)
    layout = _Layout(height, longest=max((len(name) for name, _, _ in blocks), default=0))
    drawn = _new_figure(layout.height)
    heat, curve, ratios, slider = (drawn.add_axes(box) for box in layout.boxes())
    _draw_choice(heat, report, blocks, height)
    _draw_shares(curve, report)
    _draw_ratios(ratios, report)
    _draw_slider(slider, report)
    _draw_title(drawn, report, layout)
    return drawn


def choice_colours(report: Report) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The heat map's cells, sRGB uint8 [L, T, 3]."""
    palette = np.array([_rgb(STYLE), _rgb(CONTENT), _rgb(ALONE)], dtype=np.uint8)
    cells = report.content_wins.T.int().numpy().copy()
    cells[~report.shared.numpy()] = 2
    return palette[cells]


class _Layout:
    """Where the four axes are, in pixels and in parts of the figure."""

    def __init__(self, heat: int, longest: int) -> None:
        self.heat = heat
        self.left = 66 + round(6.3 * longest)
        self.height = heat + sum(_MARGINS[part] for part in ("top", "gap", "curve", "bottom"))

    def boxes(self) -> Iterator[tuple[float, float, float, float]]:
        """(left, bottom, width, height) of the heat map, the curve below it, R beside it and the slider below R."""
        side = WIDTH - _MARGINS["right"] - _MARGINS["side"]
        middle = self.height - _MARGINS["top"] - self.heat
        for left, width in ((self.left, side - 70 - self.left), (side, _MARGINS["side"])):
            for bottom, height in ((middle, self.heat), (_MARGINS["bottom"], _MARGINS["curve"])):
                yield left / WIDTH, bottom / self.height, width / WIDTH, height / self.height


def _blocks(layers: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """(name, first layer, one past its last layer) of each run of layers in one block, down_blocks.1 or mid_block."""
    blocks, start = [], 0
    for name, run in groupby(layers, _block_of):
        size = len(list(run))
        blocks.append((name, start, start + size))
        start += size
    return blocks


def _block_of(layer: str) -> str:
    match = _BLOCK.match(layer)
    return ".".join(part for part in match.groups() if part) if match else layer


def _draw_choice(axes: "Axes", report: Report, blocks: list[tuple[str, int, int]], height: int) -> None:
    layers, steps = len(report.layers), report.steps
    if layers:
        place = (0.5, steps + 0.5, layers - 0.5, -0.5)
        axes.imshow(choice_colours(report), aspect="auto", interpolation="nearest", extent=place)
    axes.hlines([start - 0.5 for _, start, _ in blocks[1:]], 0.5, steps + 0.5, color="white", linewidth=0.8)
    ticks, last = {}, -math.inf
    for name, start, end in blocks:
        middle = (start + end - 1) / 2
        if (middle - last) * height / max(1, layers) >= _LABEL:  # names that would overlap are left out
            ticks[middle], last = name, middle
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    order = "in execution order" if report.order == "execution" else "by name: no base told their order"
    axes.set_ylabel(f"{layers} layers, {order}", fontsize=10, color=INK)
    axes.tick_params(labelbottom=False, length=3, color=FAINT)


def _draw_shares(axes: "Axes", report: Report) -> None:
    steps, shares = np.arange(1, report.steps + 1), np.array(report.style_share_by_step)
    edges = np.arange(report.steps + 1) + 0.5
    axes.stairs(shares, edges, fill=True, color=STYLE)
    axes.stairs(np.ones_like(shares), edges, baseline=shares, fill=True, color=CONTENT)
    axes.set(xlim=(0.5, report.steps + 0.5), xlabel="denoising step, from noise to image", ylabel="style's share")
    axes.set_xticks([int(tick) for tick in axes.get_xticks() if steps[0] <= tick <= steps[-1] and tick == int(tick)])
    axes.set_xlim(0.5, report.steps + 0.5)
    _as_shares(axes)


def _draw_ratios(axes: "Axes", report: Report) -> None:
    """The shared layers' R, sorted: at the height where a threshold meets them it leaves so many of them to style."""
    ratio, order = (part.numpy() for part in report.ratio[report.shared].sort())
    seen = (ratio > 0) & np.isfinite(ratio)
    axes.set_title("R = content / (gamma × style), sorted", fontsize=10, color=INK)
    _as_shares(axes)
    if not seen.any():
        axes.text(0.5, 0.5, "no layer has an R\nto compare", transform=axes.transAxes, ha="center", color=FAINT)
        return
    heights, size = (np.arange(len(ratio)) + 0.5) / len(ratio), 16 if len(ratio) < 200 else 7
    thresholds = report.thresholds.numpy()
    wins = report.content_wins[:, report.shared].T.numpy()[order]
    for colour, chosen in ((STYLE, ~wins.any(1)), (INK, wins.any(1) & ~wins.all(1)), (CONTENT, wins.all(1))):
        axes.scatter(ratio[seen & chosen], heights[seen & chosen], s=size, color=colour, zorder=3, linewidths=0)
    low, high = ratio[seen][[0, -1]]
    within = thresholds[(thresholds > low / 4) & (thresholds < high * 4)]  # far ones would leave the dots no room
    _span_logarithms(axes, min([low, *within]), max([high, *within]))
    axes.vlines(within, 0, 1, color=FAINT, linewidth=0.6, alpha=0.45)
    _name_thresholds(axes, thresholds)


def _name_thresholds(axes: "Axes", thresholds: "np.ndarray[Any, np.dtype[np.float64]]") -> None:
    """The first step's and the last one's, each named on its outer side."""
    first, last, steps = thresholds[0], thresholds[-1], len(thresholds)
    sides = ("right", "left") if first < last else ("left", "right")
    places = [(first, 0.98, "top", sides[0], 1), (last, 0.02, "bottom", sides[1], steps)]
    for threshold, height, vertical, side, step in places[: min(2, steps)]:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.text(
            threshold, height, f"threshold of step {step}", rotation=90, va=vertical, ha=side, fontsize=9, zorder=4,
            clip_on=True, bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip


def _span_logarithms(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic x from low to high and a little more, with round numbers at it."""
    axes.set_xscale("log")
    margin = max(1.15, (high / low) ** 0.09)
    axes.set_xlim(low / margin, high * margin)
    decades = range(math.floor(math.log10(low / margin)), math.ceil(math.log10(high * margin)) + 1)
    digits = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    ticks = [tick for tick in ticks if low / margin <= tick <= high * margin]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _draw_slider(axes: "Axes", report: Report) -> None:
    axes.plot(list(report.slider), list(report.slider.values()), color=STYLE, marker="o", markersize=4, linewidth=2)
    if report.style_bias > 0 and report.style_share is not None:
        axes.plot([report.style_bias], [report.style_share], color=INK, marker="o", markersize=8, fillstyle="none")
    biases = [*report.slider, *([report.style_bias] if report.style_bias > 0 else [])]
    _span_logarithms(axes, min(biases), max(biases))
    axes.axhline(0.5, color=FAINT, linewidth=0.6)
    axes.set_xlabel("style_bias (circled: as it is)")
    axes.set_title("style's share of all layers and steps", fontsize=10, color=INK)
    _as_shares(axes)


def _as_shares(axes: "Axes") -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.tick_params(labelsize=9, length=3, color=FAINT)
    axes.xaxis.label.set_fontsize(10)
    axes.yaxis.label.set_fontsize(10)


def _draw_title(drawn: "Figure", report: Report, layout: _Layout) -> None:
    from matplotlib.patches import Patch

    schedule, shared = report.schedule, report.owners
    drawn.text(
        16 / WIDTH, 1 - 14 / layout.height,
        f"K-LoRA, pattern {schedule.pattern}: alpha {schedule.alpha:g}, beta {schedule.beta:g}, style_bias "
        f"{report.style_bias:g}, gamma {report.gamma:.3g}",
        fontsize=14, fontweight="bold", va="top", color=INK,
    )  # fmt: skip
    always, share = report.always, "none" if report.style_share is None else f"{report.style_share:.0%}"
    drawn.text(
        16 / WIDTH, 1 - 42 / layout.height,
        f"{shared['both']} layers in both LoRAs. Style acts in {share} of layers and steps; "
        f"shared layers that never switch: {always['content']} content's, {always['style']} style's",
        fontsize=10.5, va="top", color=INK,
    )  # fmt: skip
    names = {"content acts": CONTENT, "style acts": STYLE}
    if shared["content"] + shared["style"]:
        names[f"one LoRA alone ({shared['content']} layers content's, {shared['style']} style's)"] = ALONE
    drawn.legend(
        handles=[Patch(color=colour, label=name) for name, colour in names.items()], loc="lower left", ncols=3,
        bbox_to_anchor=(layout.left / WIDTH, 1 - (_MARGINS["top"] - 2) / layout.height), frameon=False, fontsize=10,
        borderaxespad=0, borderpad=0.3, handlelength=1.4,
    )  # fmt: skip


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _new_figure(height: int) -> "Figure":
    with _settings_in_a_temporary_folder():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    drawn = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(drawn)
    return drawn


@contextmanager
def _settings_in_a_temporary_folder() -> Iterator[None]:
    """Whoever imports matplotlib makes folders and a list of fonts in the user's home, unless MPLCONFIGDIR names
    another place, as it does here for the import's length. One that is set already is left alone."""
    if os.environ.get("MPLCONFIGDIR"):
        yield
        return
    logger = logging.getLogger("matplotlib.font_manager")  # which tells everybody that it has looked for fonts
    level = logger.level
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]
            logger.setLevel(level)
