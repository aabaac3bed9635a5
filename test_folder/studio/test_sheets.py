"""Contact sheets and reports of a request: what they show is what its images would be, and no image is made twice."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import weights
from klora import cli
from klora.cache import Borrowed
from klora.errors import RequestError, SafetyError
from klora.form.request import Request
from klora.fusion import Fusion, Schedule, fuse, style_share
from klora.lora import LowRank
from klora.studio import Studio, save_images
from klora.studio.provenance import read_provenance
from klora.studio.sheets import LEGIBLE, SWEEP, Way, contact_sheet, draw_ways, tallied, ways_of
from test_folder.pairs import named_pair, pair_of

PAIR = {"content_lora": "sdxl_content.safetensors", "style_lora": "sdxl_style.safetensors"}
GREY = Image.new("RGB", (8, 8), "gray")


def asked(**given: Any) -> Request:
    quick = {"prompt": "a dog", "num_inference_steps": 3, "seed": 7, "width": 64, "height": 64, "output_format": "png"}
    return Request(**{**quick, "disable_safety_checker": True, **PAIR, **given})


def cells(sheet: Image.Image, count: int, height: int, width: int = 64) -> list[np.ndarray]:
    """The pictures of a sheet, found by what stands around them: white."""
    pixels, zoom = np.asarray(sheet), -(-LEGIBLE // width)
    gap = (sheet.width - count * width * zoom) // (count + 1)
    top = sheet.height - gap - height * zoom
    lefts = [gap + place * (width * zoom + gap) for place in range(count)]
    assert all((pixels[top:, left - gap : left] == 255).all() for left in lefts)
    return [pixels[top : top + height * zoom : zoom, left : left + width * zoom : zoom] for left in lefts]


COMPARED: list[Mapping[str, Any]] = [
    {"fusion": "content"}, {"fusion": "style"}, {"fusion": "sum"}, {"pattern": "s"}, {"pattern": "s*"},
]  # fmt: skip
SWEPT: list[Mapping[str, Any]] = [{"style_bias": bias} for bias in (0.5, 0.7, 1, 1.4, 2)]


@pytest.mark.parametrize(("sheet", "ways"), [("compare", COMPARED), ("sweep", SWEPT)])
def test_a_sheet_shows_the_images_that_each_way_makes(
    studio: Studio, loras: Path, sheet: str, ways: list[Mapping[str, Any]]
) -> None:
    before = studio.make(asked(), pair_of(loras))[0]
    steered = {"alpha": 1.25, **({"style_bias": 2.0} if sheet == "compare" else {})}
    (shown,) = studio.make(asked(**{sheet: True}, **steered), pair_of(loras)).values()
    for cell, way in zip(cells(shown, len(ways), 64), ways, strict=True):
        alone = asked(**way, **({} if "fusion" in way else steered))
        assert np.array_equal(cell, studio.make(alone, pair_of(loras))[0])
    assert np.array_equal(before, studio.make(asked(), pair_of(loras))[0])


def test_both_sheets_come_from_one_request(studio: Studio, loras: Path, tmp_path: Path) -> None:
    request = asked(compare=True, sweep=True)
    images = studio.make(request, pair_of(loras))
    paths = save_images(images, tmp_path, request)
    assert [path.name for path in paths] == ["klora_7_compare.png", "klora_7_sweep.png"]
    assert np.array_equal(cells(images["compare"], 5, 64)[4], cells(images["sweep"], 5, 64)[2])  # s*, style_bias 1


def alone(score: float) -> dict[str, LowRank]:
    return {"layer": LowRank(torch.full((1, 1), score), torch.ones(1, 1))}


def test_what_comes_to_the_same_is_drawn_once_and_the_steps_of_all_are_counted() -> None:
    drawn, told = [], []

    def draw(request: Request, on_step: Any) -> Image.Image:
        drawn.append(request.style_bias)
        for step in range(3):
            on_step(step, 2)
        return GREY

    ways = [Way(str(bias), asked(style_bias=bias), None, decision) for bias, decision in enumerate("abba")]
    images = draw_ways(ways, draw, lambda step, steps: told.append((step, steps)))
    assert (len(drawn), images.keys()) == (2, {"a", "b"})
    assert told == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_ways_with_the_same_choice_have_one_decision() -> None:
    fusion = fuse(alone(1.0), alone(1.0))  # R = 1: with gamma, whatever the magnitudes
    ways = ways_of(asked(sweep=True), fusion, 2)["sweep"]  # S(tau) of s* at two steps: 0.15, 0.9
    by_hand = [tuple(bias * scale < 1 for scale in (0.15, 0.9)) for bias in SWEEP]
    same = [(a.decision == b.decision) for a in ways for b in ways]
    assert same == [a == b for a in by_hand for b in by_hand]
    assert [way.style_share for way in ways] == [1 - sum(wins) / 2 for wins in by_hand]
    assert [way.caption for way in ways] == ["style acts in 0%"] * 3 + ["style acts in 50%"] * 2


@pytest.mark.parametrize("sheet", ["compare", "sweep"])
def test_progress_reaches_all_steps_of_all_images(studio: Studio, loras: Path, sheet: str) -> None:
    told: list[tuple[int, int]] = []
    studio.make(asked(**{sheet: True}), pair_of(loras), on_step=lambda *step: told.append(step))
    assert told == sorted(told)
    assert told[0][0] == 0
    assert {steps for _, steps in told} == {told[-1][0]}
    assert told[-1][0] % 3 == 0


def test_an_image_that_is_withheld_leaves_a_blank() -> None:
    ways = [Way(name, asked(), 0.25, name) for name in "ab"]
    sheet = np.asarray(contact_sheet(ways, {"b": GREY}))
    whole = np.asarray(contact_sheet(ways, {"a": GREY, "b": GREY}))
    assert sheet.shape == whole.shape
    left, right = (
        sheet[len(sheet) // 2 :, half] for half in (slice(len(sheet[0]) // 2), slice(len(sheet[0]) // 2, None))
    )
    assert (right == 128).any()
    assert (left == 255).all()
    told = (sheet[:42] != whole[:42]).any(axis=(0, 2))  # above the images
    assert told[: len(told) // 2].any() and not told[len(told) // 2 :].any()


def test_a_label_stands_above_each_image_and_below_it_what_there_is_to_say() -> None:
    silent, told = (np.asarray(contact_sheet([Way("Il", asked(), share, "a")], {"a": GREY})) for share in (None, 0.25))
    label, caption = slice(0, 22), slice(24, 40)  # of letters 13 high
    assert (silent[label] < 128).any() and np.array_equal(silent[label], told[label])
    assert (silent[caption] == 255).all() and (told[caption] < 200).any()


class Checker:
    """Withholds these images of what it is shown."""

    def __init__(self, *withheld: int) -> None:
        self.withheld = withheld

    def flagged(self, images: list[Image.Image]) -> list[bool]:
        return [place in self.withheld for place in range(len(images))]


def test_only_what_is_withheld_is_blank(fresh: Studio, loras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cells(fresh.make(asked(compare=True), pair_of(loras))["compare"], 5, 64)
    monkeypatch.setattr(fresh, "_safety", lambda: Checker(1))
    shown = cells(fresh.make(asked(compare=True, disable_safety_checker=False), pair_of(loras))["compare"], 5, 64)
    assert (shown[1] == 255).all()
    assert all(np.array_equal(shown[place], whole[place]) for place in (0, 2, 3, 4))
    monkeypatch.setattr(fresh, "_safety", lambda: Checker(0, 1, 2, 3, 4))
    with pytest.raises(SafetyError, match=r"withheld every image \(0, 1, 2, 3, 4\)"):
        fresh.make(asked(compare=True, disable_safety_checker=False), pair_of(loras))


@pytest.mark.parametrize("width", [40, 192, 400])
def test_small_images_are_enlarged_by_a_whole_number_and_large_ones_are_not(width: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, width, 3), np.uint8))
    ways = [Way("a", asked(), None, "a"), Way("b", asked(), None, "b")]
    sheet = contact_sheet(ways, {"a": picture, "b": picture})
    assert sheet.width >= 2 * LEGIBLE
    assert all(np.array_equal(cell, picture) for cell in cells(sheet, 2, 24, width))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"style_lora": None, "report": True}, "report shows K-LoRA's choice. Expected content_lora, style_lora and"),
        ({"fusion": "sum", "compare": True}, "compare shows K-LoRA's choice. Expected .* fusion klora"),
        ({"pattern": "s", "compare": True}, "pattern is s and compare is asked for. Expected auto."),
        ({"style_bias": 2, "sweep": True}, r"style_bias is 2\.0 and sweep is asked for. Expected 1\.0."),
        ({"num_outputs": 2, "sweep": True}, "num_outputs is 2 and sweep is asked for. Expected 1."),
    ],
)
def test_what_a_sheet_cannot_show_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        asked(**given)


def test_a_pair_is_summed_up_in_the_log_and_the_metrics(
    studio: Studio, loras: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts: dict[str, Any] = {}
    with caplog.at_level(logging.INFO):
        studio.make(asked(style_bias=1.4), pair_of(loras), facts.__setitem__)
    told = studio.report(asked(style_bias=1.4), pair_of(loras)).summary()
    assert facts["fusion"] == told
    assert told in caplog.messages and [text[:13] for text in caplog.messages].count("content_lora:") == 1
    assert f"style acts in {facts['style_share']:.0%}" in told


def test_the_log_says_what_a_pair_is_warned_of_and_not_only_how_often(
    studio: Studio, loras: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twice = dict.fromkeys(pair_of(loras), pair_of(loras)["content_lora"])
    with caplog.at_level(logging.INFO):
        studio.make(asked(num_inference_steps=4), twice)
    warnings = studio.report(asked(num_inference_steps=4), twice).warnings
    assert warnings and [text for text in caplog.messages if text.startswith("warning: ")] == [
        f"warning: {text}" for text in warnings
    ]


def test_a_sheet_tells_the_seconds_of_all_its_images_and_no_share_of_one(studio: Studio, loras: Path) -> None:
    told: list[tuple[str, float]] = []
    facts = dict[str, float]()
    tell = tallied(lambda name, value: told.append((name, value)))
    for value in (1.0, 2.0):
        for name in ("decode_seconds", "style_share", "flips", "flips_per_step", "gamma"):
            tell(name, value)
    assert told == [("decode_seconds", 1.0), ("gamma", 1.0), ("decode_seconds", 3.0), ("gamma", 2.0)]
    studio.make(asked(sweep=True), pair_of(loras), facts.__setitem__)
    assert not {"style_share", "flips", "flips_per_step"} & facts.keys()
    assert {"fusion", "gamma", "denoise_seconds"} <= facts.keys()


def test_a_sheet_tells_the_most_memory_that_one_image_took() -> None:
    facts = dict[str, int]()
    tell = tallied(facts.__setitem__)
    for taken in (5, 9, 7):
        tell("peak_bytes", taken)
    assert facts == {"peak_bytes": 9}


def test_a_sheet_tells_the_share_of_each_way_by_the_requests_own_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 9, generator=generator, dtype=torch.float64) + 0.5
    fusion = Fusion(tuple("abcdefghi"), {}, {}, *scores, gamma=1.0, gammas={})
    ways = ways_of(asked(compare=True, sweep=True, alpha=1.25, beta=0.5), fusion, 7)
    choices = [("s", 1.0), ("s*", 1.0), *(("s*", bias) for bias in SWEEP)]
    wins = [fusion.content_wins(Schedule.from_pattern(name, 1.25, 0.5), 7, bias) for name, bias in choices]
    shares = [way.style_share for way in [*ways["compare"], *ways["sweep"]] if way.request.fusion == "klora"]
    assert shares == [style_share(each) for each in wins]
    assert len(set(shares)) == len(SWEEP) + 1


def test_a_report_of_a_request_is_about_its_own_choice(studio: Studio, loras: Path) -> None:
    report = studio.report(asked(style_bias=1.4, pattern="s", alpha=1.25, beta=0.75), pair_of(loras))
    content, style = (
        studio.load(*weights.find_base("sdxl")).read_lora(loras / f"sdxl_{role}.safetensors")
        for role in ("content", "style")
    )
    fusion: Fusion = fuse(content, style)
    assert torch.equal(report.content_wins, fusion.content_wins(Schedule.from_pattern("s", 1.25, 0.75), 3, 1.4))
    assert report.order == "execution"


def test_a_report_of_a_request_tells_the_alphas_of_either_file(studio: Studio, loras: Path, tmp_path: Path) -> None:
    files = pair_of(loras)
    tensors = load_file(files["style_lora"].path)
    A = next(key for key in tensors if key.startswith("unet.") and key.endswith("lora_A.weight"))
    alpha = {A.replace("lora_A.weight", "alpha"): torch.tensor(2.0)}
    save_file(tensors | alpha, tmp_path / "style.safetensors")
    files["style_lora"] = Borrowed(tmp_path / "style.safetensors")
    assert studio.report(asked(), files).alphas == {"content": {}, "style": {2.0: 1}}


def test_the_command_makes_a_sheet_and_makes_it_again(models: Path, loras: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for file in pair_of(loras).values():
            Path(file.path.name).symlink_to(file.path)
        given = [*named_pair("sdxl"), "--num-inference-steps", "2", "--seed", "7", "--output-format", "png"]
        given += ["--disable-safety-checker"]
        made = CliRunner().invoke(cli.app, ["fuse", "a dog", *given, "--compare", "--report"])
        assert made.exit_code == 0, made.stderr
        names = ["klora_7_compare.png", "report.png", "report.json"]
        assert made.stdout.splitlines()[:3] == [f"out/{name}" for name in names]
        assert json.loads(Path("out/report.json").read_text())["steps"] == 2
        assert read_provenance(Path("out/klora_7_compare.png")).place == "compare"
        again = CliRunner().invoke(cli.app, ["reproduce", "out/klora_7_compare.png"])
        assert again.stdout.splitlines() == ["reproduced/klora_7_compare.png", "the same pixels as klora_7_compare.png"]
