"""What a report says of a fusion: numbers against a naive computation, warnings that come when they should, a picture
whose cells have their colours at their places, and the `klora report` command."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from klora import cli
from klora.errors import LoRAError, RequestError
from klora.files.report import stated_alphas
from klora.form.pair import Question
from klora.form.request import Request
from klora.fusion import Schedule, fuse
from klora.generation import combine
from klora.lora import LoRA, LowRank
from klora.report import Report, report_on
from klora.report.numbers import BIASES, QUANTILES
from klora.report.pair import answer, read_pair, save_report
from klora.report.picture import ALONE, CONTENT, STYLE, _block_of, choice_colours, draw, figure

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = [("s", 1.5, 0.5), ("s*", 1.5, 1.275)]
BLOCKS = ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0")


def names(count=40):
    return [f"{BLOCKS[i * len(BLOCKS) // count]}.attentions.0.to_{i}" for i in range(count)]


def made(layers, rank=4, seed=0, spread=0.2, scale=1.0, side=24):
    """{name: pair} of Gaussian factors; spread: of the logarithm of a layer's magnitude."""
    generator = torch.Generator().manual_seed(seed)
    factors = scale * torch.exp(spread * torch.randn(len(layers), generator=generator))
    pairs = {}
    for name, factor in zip(layers, factors, strict=True):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, side), (side, rank)))
        pairs[name] = LowRank(A, B * factor)
    return pairs


def reported(content, style, pattern="s", steps=20, style_bias=1.0, **options):
    return report_on(fuse(content, style), Schedule.from_pattern(pattern), steps, style_bias, **options)


def healthy(**options):
    return reported(made(names(), seed=1), made(names(), seed=2), **options)


def partly_shared():
    """40 layers, of which content lacks the first three and style the last two."""
    return made(names()[3:], rank=4, seed=1, spread=0.5), made(names()[:-2], rank=5, seed=2, spread=0.5)


# Numbers.


class Naive:
    """All of a report from dense products, one layer and one step at a time."""

    def __init__(self, content, style, kind, schedule, steps):
        self.layers = [name for name in names() if name in content or name in style]
        self.shared = [name for name in self.layers if name in content and name in style]
        self.scale = [schedule(i, steps) for i in range(steps)]
        l1, top = {}, {}
        for role, lora in (("content", content), ("style", style)):
            for name, pair in lora.items():
                entries = sorted((pair.B.double() @ pair.A.double()).abs().flatten().tolist(), reverse=True)
                k = content[name].rank * style[name].rank if name in self.shared else pair.rank
                l1[role, name], top[role, name] = sum(entries), sum(entries[:k])
        ratios = [l1["content", n] / l1["style", n] for n in self.shared]
        mean = sum(ratios) / len(ratios)
        kept = [ratio for ratio in ratios if ratio < 3 * mean]
        sums = [sum(l1[role, n] for n in self.shared) for role in ("content", "style")]
        self.gammas = {"reference": sum(kept) / len(kept), "paper": sums[0] / sums[1]}
        gamma = self.gammas[kind]
        self.R = {n: top["content", n] / (gamma * top["style", n]) for n in self.shared}
        self.R |= {n: math.inf if n in content else 0.0 for n in self.layers if n not in self.shared}

    def wins(self, bias):
        return [[self.R[name] > bias * scale for name in self.layers] for scale in self.scale]

    def share(self, bias):
        cells = [won for step in self.wins(bias) for won in step]
        return 1 - sum(cells) / len(cells)


@pytest.mark.parametrize("kind", ["reference", "paper"])
@pytest.mark.parametrize("bias", [1.0, 0.6])
@pytest.mark.parametrize(("pattern", "alpha", "beta"), PUBLISHED)
def test_every_number_is_the_naive_one(pattern, alpha, beta, bias, kind):
    content, style = partly_shared()
    report = report_on(fuse(content, style, gamma=kind), Schedule.from_pattern(pattern), 12, bias)

    def scale(i, steps):
        line = alpha * (i + 0.5) / steps + beta
        return line % alpha if pattern == "s*" else line

    naive = Naive(content, style, kind, scale, 12)
    wins = naive.wins(bias)
    columns = [[step[naive.layers.index(name)] for step in wins] for name in naive.shared]
    about = {"rel": 1e-5}  # products in float32
    assert report.layers == tuple(naive.layers)
    assert dict(report.owners) == {"both": 35, "content": 2, "style": 3}
    assert dict(zip(report.layers, report.ratio.tolist(), strict=True)) == pytest.approx(naive.R, **about)
    assert report.gammas == pytest.approx(naive.gammas, **about) and report.gamma == report.gammas[kind]
    assert report.thresholds.tolist() == pytest.approx([bias * s for s in naive.scale])
    assert report.content_wins.tolist() == wins
    assert report.style_share_by_step == pytest.approx([1 - sum(step) / len(step) for step in wins])
    assert report.style_share == pytest.approx(naive.share(bias))
    assert report.always == {"content": sum(map(all, columns)), "style": sum(not any(c) for c in columns)}
    assert report.slider == pytest.approx({b: naive.share(b) for b in BIASES})
    R = sorted(naive.R[name] for name in naive.shared)
    assert report.quantiles == pytest.approx({q: R[round(q * 34)] for q in QUANTILES}, **about)
    assert report.ranks == {"content": {4: 37}, "style": {5: 38}}


def test_the_slider_has_the_five_stops_and_more_style_at_each():
    assert {0.5, 0.7, 1, 1.4, 2} <= set(BIASES) and (min(BIASES), max(BIASES)) == (0.25, 4)
    shares = list(healthy().slider.values())
    assert shares == sorted(shares) and shares[0] < 0.05 and shares[-1] > 0.95


@pytest.mark.parametrize(("pattern", "alpha", "beta"), PUBLISHED)
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_balance_is_where_style_acts_in_a_half(pattern, alpha, beta, spread):
    loras = (made(names(), seed=1, spread=spread), made(names(), seed=2, spread=spread))
    report = reported(*loras, pattern=pattern, steps=30)
    assert reported(*loras, pattern=pattern, steps=30, style_bias=report.balance).style_share == pytest.approx(
        0.5, abs=0.02
    )


def test_there_is_no_balance_where_all_is_one_choice():
    lora = made(names())
    assert reported(lora, lora, steps=1).balance is None  # all of it or none
    assert (
        reported(lora, {}).balance is None and reported({}, lora).balance is None and reported({}, {}).balance is None
    )


def test_the_style_share_is_the_metric_of_a_request():
    content, style = (LoRA(lora) for lora in partly_shared())
    facts = {}
    combine(Request("x", pattern="s", style_bias=1.3), 17, content, style, facts.__setitem__)
    report = reported(content, style, steps=17, style_bias=1.3)
    assert (report.style_share, report.gamma) == pytest.approx((facts["style_share"], facts["gamma"]))


def test_a_layer_that_is_zero_in_both_is_styles_as_in_the_choice():
    content, style = made(names(), seed=1), made(names(), seed=2)
    for lora in (content, style):
        lora[names()[0]] = LowRank(torch.zeros(4, 24), torch.zeros(24, 4))
    report = reported(content, style)
    assert report.ratio[0] == 0 and not report.content_wins[:, 0].any() and report.warnings == ()


@pytest.mark.parametrize(("steps", "bias"), [(0, 1.0), (-1, 1.0), (20, -0.1), (20, math.inf), (20, math.nan)])
def test_what_makes_no_sense_is_refused(steps, bias):
    with pytest.raises(RequestError, match=r"^(steps|style_bias) is .*\. Expected"):
        healthy(steps=steps, style_bias=bias)


def strictly(text):
    def refused(token):
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refused)


def test_json_goes_there_and_back():
    report = reported(*partly_shared(), pattern="s*", steps=9, alphas={"content": {8.0: 37}})
    told = strictly(json.dumps(report.to_json(), allow_nan=False))
    assert [[letter == "c" for letter in step] for step in told["wins"]] == report.content_wins.tolist()
    assert list(told["ratio"]) == list(report.layers)
    infinite = [name for name, R in told["ratio"].items() if R is None]
    assert infinite == told["content_only"] == names()[-2:] and told["style_only"] == names()[:3]
    assert all(R == S for R, S in zip(told["ratio"].values(), report.ratio.tolist(), strict=True) if R is not None)
    assert told["layers"] == {"shared": 35, "content_only": 2, "style_only": 3}
    assert told["slider"] == {f"{bias:g}": share for bias, share in report.slider.items()}
    assert (told["alphas"], told["ranks"]["style"]) == ({"content": {"8": 37}}, {"5": 38})
    for name in ("pattern", "order", "steps", "style_bias", "gamma", "gammas", "style_share", "balance", "always"):
        assert told[name] == getattr(report, name)
    assert (told["alpha"], told["beta"]) == (1.5, 1.275)
    assert told["thresholds"] == report.thresholds.tolist()
    assert told["style_share_by_step"] == report.style_share_by_step


@pytest.mark.parametrize("roles", [(0, 0), (0, 1), (1, 0)])
def test_json_is_strict_also_of_loras_without_layers(roles):
    content, style = (made(names()) if there else {} for there in roles)
    report = reported(content, style)
    assert strictly(json.dumps(report.to_json(), allow_nan=False))["ratio_quantiles"] == {}
    assert draw(report) and "\n" not in report.summary()


def test_the_summary_is_one_line_with_the_numbers():
    report = reported(*partly_shared(), pattern="s", steps=9, style_bias=0.8)
    line = report.summary()
    assert line.startswith(
        "klora s alpha 1.5 beta 0.5 style_bias 0.8 steps 9: 35 layers shared, 2 content's, 3 style's;"
    )
    assert f"gamma {report.gamma:.3g}" in line and f"style acts in {report.style_share:.0%}" in line
    assert "\n" not in line and len(line) < 400


# Warnings.


@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_a_healthy_pair_has_no_warnings(pattern):
    assert healthy(pattern=pattern).warnings == ()


def zeros(layers):
    return {name: LowRank(torch.randn(4, 24), torch.zeros(24, 4)) for name in layers}


ONE, OTHER = made(names(), seed=1), made(names(), seed=2)
WARNINGS = {
    "style far larger": (ONE, made(names(), seed=2, scale=85.0), {}, "Magnitudes differ 8", "lower style_scale."),
    "content far larger": (made(names(), seed=1, scale=40.0), OTHER, {}, "Magnitudes differ ", "lower content_scale."),
    "few content ranks": (ONE, made(names(), rank=128, seed=2), {}, "Ranks 4 (content) and 128 (style) favour content",
                          "style_bias 1.5 allows for it."),
    "few style ranks": (made(names(), rank=128, seed=1), OTHER, {}, "Ranks 128 (content) and 4 (style) favour style",
                        "style_bias 0.68 allows for it."),
    "few shared": (made(names()[:22], seed=1), made(names()[18:], seed=2), {}, "Only 4 of 40 layers are in both LoRAs",
                   "content always acts in its own 18, style in its own 18."),
    "none shared": (made(names()[:20]), made(names()[20:]), {}, "No layer is in both LoRAs (20 content's, 20 style's)",
                    "style_bias changes nothing."),
    "all alike": (ONE, ONE, {}, "All 40 shared layers are alike (R 1 to 1)", "as step 8 of 20 begins"),
    "one step": (ONE, OTHER, {"steps": 1}, "There is one step", "num_inference_steps more."),
    "content is zeros": (zeros(names()), OTHER, {}, "The content LoRA is all zeros", "Train it first."),
    "style is zeros": (ONE, zeros(names()), {}, "The style LoRA is all zeros", "Train it first."),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_each_warning_comes_for_its_reason_alone(case):
    content, style, options, begins, says = WARNINGS[case]
    (warning,) = reported(content, style, **options).warnings
    assert warning.startswith(begins) and says in warning


def test_the_step_of_an_alike_pair_is_the_one_that_differs():
    wins = reported(ONE, ONE).content_wins
    assert wins[6].all() and not wins[7].any()  # 0-based


@pytest.mark.parametrize(("low", "high"), [(4, 64), (2, 16)])
def test_few_ranks_are_favoured_as_the_warning_says(low, high):
    few, many = (made(names(4), rank=rank, seed=rank, spread=0.0, side=700) for rank in (low, high))
    favour = (1 + 2 / low) / (1 + 2 / high)
    assert fuse(few, many).ratio.mean().item() == pytest.approx(favour, rel=0.1)
    assert fuse(many, few).ratio.mean().item() == pytest.approx(1 / favour, rel=0.1)


def with_ratios(ratios):
    """A fusion whose R is as given."""
    fusion = fuse(ONE, OTHER)
    content = torch.tensor(ratios, dtype=torch.float64) * fusion.gamma * fusion.style_score
    return replace(fusion, content_score=content)


def report_of(fusion, style_bias=1.0):
    return report_on(fusion, Schedule.from_pattern("s"), 20, style_bias)


def test_layers_that_never_switch_are_told_with_the_style_bias_that_helps():
    fusion = with_ratios([6.0] * 24 + [0.1] * 4 + [0.7 + i / 10 for i in range(12)])
    report = report_of(fusion)
    (warning,) = report.warnings
    assert warning == (
        f"28 of 40 shared layers (70%) never switch: 24 are always content's, 4 always style's. Try style_bias "
        f"{report.balance:g}, which brings style's share from {report.style_share:.0%} to about a half."
    )
    assert report_of(fusion, report.balance).style_share == pytest.approx(0.5, abs=0.1)


def test_where_style_has_its_half_a_larger_alpha_is_advised():
    (warning,) = report_of(with_ratios([8.0, 0.125] * 20)).warnings
    assert warning.endswith("Style acts in 50% even so; a larger alpha lets more of them switch.")


def test_where_no_style_bias_helps_that_is_said():
    report = report_of(with_ratios([1000.0] * 30 + [0.001] * 10))
    assert report.balance is None
    assert report.warnings[0].endswith("Style acts in 25%, and no style_bias up to 10 brings that near a half.")


# The picture.


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


# Two files.


def kohya(source, target, alpha):
    """The same LoRA under kohya's names, alpha/rank left to the reader."""
    tensors = {}
    for key, tensor in load_file(source).items():
        stem, _, factor = key.removeprefix("unet.").removesuffix(".weight").rpartition(".lora_")
        stem = f"lora_unet_{stem.replace('.', '_')}"
        rank = tensor.shape[0 if factor == "A" else 1]
        tensors[f"{stem}.lora_{'down' if factor == 'A' else 'up'}.weight"] = (
            tensor if factor == "A" else tensor * rank / alpha
        )
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, target)
    return target


def files(loras, family="sdxl"):
    return {f"{role}_lora": loras / f"{family}_{role}.safetensors" for role in ("content", "style")}


def base(bases, name="sdxl"):
    return {name: ("sdxl" if name == "sdxl" else "flux", bases / name)}


QUESTION = Question("content", "style")


@pytest.mark.parametrize(("family", "name", "steps"), [("sdxl", "sdxl", 30), ("flux", "flux-dev", 28)])
def test_with_a_base_its_order_and_its_steps_hold(bases, loras, family, name, steps):
    report, pair = answer(QUESTION, files(loras, family), base(bases, name))
    assert (report.order, pair.base, report.steps) == ("execution", name, steps)
    assert report.layers == tuple(pair.content)
    assert "layers in its execution order" in str(pair)


def test_without_a_base_the_ratios_are_the_same_and_the_order_is_by_name(bases, loras, tmp_path):
    given = files(loras)
    report, _ = answer(QUESTION, given, base(bases))
    given["content_lora"] = kohya(given["content_lora"], tmp_path / "kohya.safetensors", alpha=2)
    bare, pair = answer(QUESTION, given, {})
    assert (bare.order, pair.base, bare.alphas) == ("file", None, {"content": {2.0: len(bare.layers)}, "style": {}})
    flat = {name.replace(".", "_"): R for name, R in zip(report.layers, report.ratio.tolist(), strict=True)}
    spelled = {name.replace(".", "_"): R for name, R in zip(bare.layers, bare.ratio.tolist(), strict=True)}
    assert spelled == pytest.approx(flat, rel=1e-4)  # the means behind gamma are of other orders
    assert bare.to_json()["order"] == "file" and "by name" in figure(bare).axes[0].get_ylabel()
    assert "layers by name (none of their family is installed)" in str(pair)


def test_by_name_numbers_count_as_numbers(tmp_path):
    stems = [f"unet.mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in (10, 2, 1)]
    keys = {f"{stem}.lora_{factor}.weight": torch.randn(4, 4) for stem in stems for factor in "AB"}
    for role in ("content", "style"):
        save_file(keys, tmp_path / f"sdxl_{role}.safetensors")
    layers = list(read_pair(files(tmp_path), {}).content)
    assert [name.split(".")[4] for name in layers] == ["1", "2", "10"]


def test_a_base_that_cannot_read_them_is_named(bases, tmp_path):
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for role in ("content", "style"):
        save_file({f"{stem}.lora_{f}.weight": torch.randn(7, 7) for f in "AB"}, tmp_path / f"sdxl_{role}.safetensors")
    _, pair = answer(QUESTION, files(tmp_path), base(bases))
    assert pair.base is None and "layers by name (sdxl: sdxl_content.safetensors was made for another base" in str(pair)


def test_pairs_that_cannot_be_told_apart_or_matched_are_refused(loras, tmp_path):
    mixed = {"content_lora": loras / "sdxl_content.safetensors", "style_lora": loras / "flux_style.safetensors"}
    with pytest.raises(LoRAError, match=r"content_lora was made for SDXL and style_lora for FLUX\.1\. Expected two"):
        read_pair(mixed, {})
    names = {"content": "down_blocks.1.attentions.0.to_q", "style": "input_blocks.4.1.to_q"}
    for role, name in names.items():
        save_file({f"{name}.lora_{f}.weight": torch.randn(4, 4) for f in "AB"}, tmp_path / f"sdxl_{role}.safetensors")
    with pytest.raises(LoRAError, match=r"only a base can tell which is which\. Expected KLORA_MODELS"):
        read_pair(files(tmp_path), {})
    narrow = {f"{names['content']}.lora_{f}.weight": torch.randn((4, 5) if f == "A" else (5, 4)) for f in "AB"}
    save_file(narrow, tmp_path / "sdxl_style.safetensors")
    with pytest.raises(LoRAError, match=r"is \(4, 4\) in content_lora and \(5, 5\) in style_lora\. Expected one base"):
        read_pair(files(tmp_path), {})


def test_alphas_are_told_of_the_denoiser_alone(tmp_path):
    alphas = {"lora_unet_a.alpha": 8.0, "lora_unet_b.alpha": 4.0, "lora_unet_c.alpha": 8.0, "lora_te1_x.alpha": 1.0}
    save_file({key: torch.tensor(alpha) for key, alpha in alphas.items()}, tmp_path / "x.safetensors")
    assert stated_alphas(tmp_path / "x.safetensors") == {4.0: 1, 8.0: 2}


def test_alphas_that_metadata_states_are_applied_without_a_base(loras, tmp_path):
    given = files(loras)
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    save_file(load_file(given["content_lora"]), tmp_path / "stated.safetensors", said)
    plain, stated = (read_pair(given | {"content_lora": path}, {}).content for path in (
        given["content_lora"], tmp_path / "stated.safetensors"))  # fmt: skip
    assert all(torch.allclose(stated[name].B, 2 * plain[name].B) for name in plain)  # rank 4


def test_scores_that_are_kept_are_not_computed_again(bases, loras, tmp_path, monkeypatch):
    scores = {name: tmp_path / f"{name}.json" for name in ("content_lora", "style_lora")}
    first, _ = answer(QUESTION, files(loras), base(bases), scores)

    def refused(*_):
        raise AssertionError("a product was computed")

    monkeypatch.setattr("klora.fusion.importance", refused)
    again, _ = answer(QUESTION, files(loras), base(bases), scores)
    assert again.to_json() == first.to_json()


# The command.


def test_a_real_process_writes_both_files_and_touches_nothing_else(bases, loras, tmp_path):
    """matplotlib only once it draws, no pyplot, and nothing in the user's home."""
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    code = (
        "import os, sys; from klora.cli import app\n"
        "assert 'matplotlib' not in sys.modules\n"
        "app(standalone_mode=False)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'MPLCONFIGDIR' not in os.environ\n"
    )
    command = [sys.executable, "-c", code, "report", *map(str, files(loras).values()), "--pattern", "s", "--steps", "7"]
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(home), "KLORA_MODELS": str(bases), "OMP_NUM_THREADS": "1"}
    command += ["--beta", "0.6", "--style-bias", "1.5", "--out", str(out)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = strictly((out / "report.json").read_text())
    assert (told["pattern"], told["steps"], told["beta"], told["style_bias"]) == ("s", 7, 0.6, 1.5)
    assert Image.open(out / "report.png").width >= 1200
    assert result.stdout.startswith("klora s alpha 1.5 beta 0.6 style_bias 1.5 steps 7: ")
    assert all(f"warning: {text}" in result.stdout for text in told["warnings"]) and told["warnings"]
    assert result.stdout.splitlines()[-2:] == [str(out / "report.png"), str(out / "report.json")]
    assert list(home.iterdir()) == [] and "font" not in result.stderr


@pytest.fixture
def shell(bases, loras, tmp_path, monkeypatch):
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return [str(path) for path in files(loras).values()]


def test_its_errors_are_one_line_and_its_bounds_a_requests(shell, loras):
    invoke = CliRunner().invoke
    mixed = invoke(cli.app, ["report", shell[0], str(loras / "flux_style.safetensors")])
    assert (mixed.exit_code, mixed.stderr.count("\n")) == (1, 1) and mixed.stderr.startswith(
        "Error: content_lora was made"
    )
    for option, value in (("--pattern", "t"), ("--style-bias", "11"), ("--alpha", "-1"), ("--steps", "0")):
        assert invoke(cli.app, ["report", *shell, option, value]).exit_code == 2
    assert not Path("out").exists()


def test_both_names_of_the_steps_mean_the_same(shell):
    for option in ("--steps", "--num-inference-steps"):
        assert CliRunner().invoke(cli.app, ["report", *shell, option, "3"]).exit_code == 0
        assert strictly(Path("out/report.json").read_text())["steps"] == 3


def test_saving_makes_the_folder(tmp_path):
    assert isinstance(healthy(), Report)
    assert all(path.is_file() for path in save_report(healthy(), tmp_path / "a" / "b"))
