"""The picture of a report: cells have their colours at their places, curves their numbers, blocks their names."""

import io

import numpy as np
import pytest
from PIL import Image

from klora.report.picture import ALONE, CONTENT, STYLE, _block_of, choice_colours, draw, figure
from test_folder.report.reporting import BLOCKS, healthy, made, partly_shared, reported


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def rgb(colour):
    return tuple(bytes.fromhex(colour[1:]))


def test_every_cell_has_its_colour_at_its_place():
    report = reported(*partly_shared(), steps=10)
    drawn, picture = figure(report), pixels(draw(report))
    assert picture.shape[1] >= 1200 and picture.shape[:2] == tuple(reversed(drawn.canvas.get_width_height()))
    heat = drawn.axes[0]
    for step in range(10):
        for layer, owner in enumerate(report.owner):
            x, y = heat.transData.transform((step + 1, layer + 0.2))  # beside the separators
            wins = bool(report.content_wins[step, layer])
            expected = rgb(ALONE if owner != "both" else CONTENT if wins else STYLE)
            assert tuple(picture[len(picture) - 1 - round(y), round(x)]) == expected, (step, layer)
            assert tuple(choice_colours(report)[layer, step]) == expected


def test_blocks_are_separated_and_named():
    heat = figure(healthy()).axes[0]
    (lines,) = heat.collections
    assert [segment[0][1] for segment in lines.get_segments()] == [9.5, 19.5, 29.5]
    assert [label.get_text() for label in heat.get_yticklabels()] == list(BLOCKS)


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1"),
        ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "down_blocks.1"),
        ("mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0", "mid_block"),
        ("mid_block_attentions_0_transformer_blocks_3_attn2_to_k", "mid_block"),
        ("transformer_blocks.18.attn.to_q", "transformer_blocks.18"),
        ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.7"),
        ("double_blocks_3_img_attn_qkv", "double_blocks.3"),
        ("x_embedder", "x_embedder"),
    ],
)
def test_a_layers_block(layer, block):
    assert _block_of(layer) == block


def test_the_names_of_many_blocks_do_not_overlap():
    report = reported(*(made([f"transformer_blocks.{i}.to_q" for i in range(200)], seed=seed) for seed in (1, 2)))
    drawn = figure(report)
    places = drawn.axes[0].transData.transform([(0, tick) for tick in drawn.axes[0].get_yticks()])[:, 1]
    assert len(places) > 20 and np.abs(np.diff(places)).min() >= 13
    assert len(drawn.axes[0].collections[0].get_segments()) == 199


def test_curves_and_ratios_are_the_reports():
    report = reported(*partly_shared(), pattern="s*", steps=10, style_bias=1.2)
    _, curve, ratios, slider = figure(report).axes
    assert curve.patches[0].get_data().values.tolist() == report.style_share_by_step
    drawn = np.concatenate([dots.get_offsets()[:, 0] for dots in ratios.collections if len(dots.get_offsets()) > 1])
    shown = report.ratio[report.shared].numpy()
    assert set(shown) <= set(drawn) and ratios.get_xscale() == "log"
    line, now = slider.lines[0], slider.lines[1]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == report.slider
    assert (now.get_xdata()[0], now.get_ydata()[0]) == (1.2, report.style_share)


@pytest.mark.parametrize(("steps", "named"), [(1, [1]), (2, [1, 2]), (20, [1, 20])])
def test_the_thresholds_of_the_first_and_the_last_step_are_named(steps, named):
    ratios = figure(healthy(steps=steps)).axes[2]
    assert [text.get_text() for text in ratios.texts] == [f"threshold of step {step}" for step in named]


def test_the_title_says_what_was_asked():
    said = " ".join(text.get_text() for text in figure(healthy(pattern="s*", style_bias=0.7)).texts)
    for part in ("pattern s*", "alpha 1.5", "beta 1.275", "style_bias 0.7", "gamma "):
        assert part in said


@pytest.mark.parametrize("options", [{"style_bias": 0.0}, {"style_bias": 1e6}, {"steps": 1}, {"steps": 500}])
@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_the_ends_of_what_may_be_asked_are_drawn(pattern, options):
    assert pixels(draw(healthy(pattern=pattern, **options))).shape[1] == 1280


def test_a_report_always_looks_the_same():
    assert draw(healthy()) == draw(healthy())
