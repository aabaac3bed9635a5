"""What fails stops a run or is passed over, and what is said of it and on the way."""

import json
import resource
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import weights
from klora.bulk.batch import DrawBatch
from klora.bulk.lines import PromptFile
from klora.bulk.run import progress
from klora.cache import Borrowed
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.form.request import Request
from klora.studio import Check, Studio
from klora.training.dataset import read_upload
from predict import Predictor
from test_folder import tiny
from test_folder.bulk.prompting import CPU, PROMPTS, QUICK, Runs, pictures, read, written
from test_folder.fakes.hostile import Hostile, drips, head


def test_bad_lines_stop_before_anything_is_made_unless_they_are_to_be_skipped(runs: Runs, tmp_path: Path) -> None:
    prompts = read(written(tmp_path / "p.jsonl", {"prompt": "a dog"}, "{", "", *(["[]"] * 11)))
    with pytest.raises(RequestError) as error:
        runs(prompts)
    assert str(error.value).startswith("Some lines cannot be used: line 2: It is no JSON: ")
    assert "line 12: " in str(error.value) and "line 13: " not in str(error.value)
    assert str(error.value).endswith(" 2 more. Mend them, or skip them by on_error.")
    assert not (tmp_path / "out").exists()
    said = runs(prompts, on_error="skip")
    assert said[:2] == ["Skipped empty lines: 3.", said[1]] and said[1].startswith("1 of 1, ")
    assert sum(line.startswith("Not made: line ") for line in said) == 12


@pytest.mark.parametrize("given", [{"style_bias": 2.0}, {"pattern": "s"}, {"fusion": "style"}], ids=str)
def test_what_one_lora_cannot_do_stops_before_anything_is_made(
    runs: Runs, tmp_path: Path, given: dict[str, Any]
) -> None:
    prompts = read(written(tmp_path / "p.jsonl", {"prompt": "a dog"}, {"prompt": "a cat", **given}), content_lora="a")
    with pytest.raises(
        RequestError, match=rf"^Some lines cannot be used: line 2: {min(given)} is .*Mend them, or skip"
    ):
        runs(prompts, drawing=no_drawing)


def no_drawing(*_: Any) -> Any:
    raise AssertionError("nothing is to be drawn")


def test_a_file_that_the_disk_does_not_take_is_named_and_nothing_of_it_stays(
    runs: Runs, prompts: PromptFile, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            runs(prompts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path(failed.value.filename).parent == tmp_path / "out"
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_lines_stop_where_that_is_asked_for(runs: Runs, tmp_path: Path) -> None:
    prompts = read(written(tmp_path / "p.txt", "a dog", "", "a cat", " "))
    assert runs(prompts, count=1)[0] == "Skipped empty lines: 2, 4."
    with pytest.raises(RequestError, match=r"line 2: It is empty\. Expected a prompt\. line 4: It is empty"):
        runs(prompts, on_error="stop")


def test_inputs_that_change_nothing_are_named_with_how_many_images_they_are_of(runs: Runs, tmp_path: Path) -> None:
    lines: list[Any] = [{"prompt": "a dog"}, {"prompt": "a cat", "style_lora": "b"}, {"prompt": "an owl"}]
    given = {"content_lora": "a", "style_scale": 2.0, "output_format": "png", "output_quality": 20}
    said = runs(read(written(tmp_path / "p.jsonl", *lines), **given))
    assert said[:2] == [
        "In 2 of 3 images style_scale changes nothing: no style LoRA acts.",
        "In 3 of 3 images output_quality changes nothing: png is exact.",
    ]


def failing(draw: DrawBatch, error: KLoRAError, *prompts: str) -> DrawBatch:
    """Fails where a batch has one of these."""

    def draw_(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        if {request.prompt for request in asked} & {*prompts}:
            raise error
        return draw(asked, check)

    return draw_


def test_one_prompt_that_cannot_be_read_spoils_no_other(
    runs: Runs, draw: DrawBatch, prompts: PromptFile, tmp_path: Path
) -> None:
    error = RequestError("Both LoRAs teach the word 'red'. Write content:red or style:red in the prompt.")
    said = runs(prompts, drawing=failing(draw, error, PROMPTS[1]), on_error="skip")
    assert said[-1] == f"Not made: line 2: {error}"
    assert sorted(pictures(tmp_path / "out")) == ["00000.png", "00002.png", "00003.png", "00004.png"]


def test_a_lora_that_fails_stops_unless_the_rest_is_to_be_done(
    runs: Runs, draw: DrawBatch, prompts: PromptFile, tmp_path: Path
) -> None:
    drawing = failing(draw, LoRAError("style_lora is no LoRA."), PROMPTS[1])
    said = runs(prompts, drawing=drawing)
    assert said[0] == "2 of 5"  # at no speed: none was drawn
    assert said[1] == "Stopped at a line that failed. The same command goes on; on_error skip passes over it."
    assert said[-2:] == [f"Not made: line {line}: style_lora is no LoRA." for line in (1, 2)]
    assert pictures(tmp_path / "out") == {}
    said = runs(prompts, drawing=drawing, on_error="skip")
    assert said[-2:] == [f"Not made: line {line}: style_lora is no LoRA." for line in (1, 2)]
    assert sorted(pictures(tmp_path / "out")) == ["00002.png", "00003.png", "00004.png"]
    assert runs(prompts)[-1] == f"2 images made in {tmp_path / 'out'}, 3 were there before."


def test_a_picture_that_klora_has_not_made_stays_and_is_refused_before_any_is_made(
    runs: Runs, prompts: PromptFile, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(own := tmp_path / "out" / "00003.png")
    before = own.read_bytes()
    with pytest.raises(RequestError, match=r"^00003\.png does not say how it was made\."):
        runs(prompts, drawing=no_drawing)
    assert own.read_bytes() == before


def test_withheld_images_are_named_and_not_made_again(
    bases: Path, pair: dict[str, Borrowed], runs: Runs, tmp_path: Path
) -> None:
    checker = tiny.build_safety_checker(tmp_path / "checker", flags=True)
    flagging = Studio(lambda *_: ("sdxl", "sdxl", bases / "sdxl"), checker, CPU)
    asked: list[int] = []

    def drawing(requests: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        asked.append(len(requests))
        return flagging.draw(requests, pair, check)

    lines = ({"prompt": prompt, "disable_safety_checker": prompt == "a dog"} for prompt in ("a dog", "a cat", "x"))
    prompts = read(written(tmp_path / "p.jsonl", *lines))
    said = runs(prompts, drawing=drawing)
    assert said[-2:] == [f"1 images made in {tmp_path / 'out'}.", "The safety checker withheld those of lines 2, 3."]
    assert [*pictures(tmp_path / "out")] == ["00000.png"]
    assert json.loads((tmp_path / "out" / "00001.json").read_text())["withheld"] is True
    assert asked == [1, 2]
    runs(prompts, drawing=drawing)
    assert asked == [1, 2]
    assert [picture.name for picture in read_upload(tmp_path / "out")[0]] == ["00000.png"]


def test_the_downloads_of_all_lines_have_the_seconds_of_one_request(
    shell: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a thousand lines that name a trickling host would keep the server's only slot for a thousand times as long."""
    late = "All downloads of this request took longer than 0.4 seconds. Expected faster sources."
    paths = [f"/{number}.safetensors" for number in range(20)]
    asked: dict[str, Any] = {**QUICK, "prompt": "{}", "seed": 5}
    with Hostile(dict.fromkeys(paths, drips(head(200, "Content-Length: 99999"), b"x", 0.05))) as host:
        monkeypatch.setattr(weights, "FETCH_SECONDS", 0.4)
        monkeypatch.setenv("KLORA_TRUSTED_HOSTS", host.host)
        monkeypatch.setenv("KLORA_CACHE", str(shell / "cache"))
        server = Predictor()
        server.outputs, server.studio, server.loras = shell / "outputs", studio, weights.LoRAFiles(shell)
        loras = [*map(host.url, paths), "style.safetensors"]
        lines = written(shell / "p.jsonl", *({"prompt": "a dog", "style_lora": lora} for lora in loras))
        tar = server._make_lines({**asked, "prompts": lines}, {})
    assert {client.path for client in host.requests} == {paths[0]}
    with tarfile.open(tar) as made:
        assert made.getnames() == ["00020.json", "00020.png", "00020.txt", "failures.txt"]
        failures = made.extractfile("failures.txt")
        assert failures and failures.read().decode().splitlines() == [
            f"line {line}: style_lora: {late}" for line in range(1, 21)
        ]


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ((12, 100, 12, 15.0), "12 of 100, 0.8 images/s, 1 min 50 s left"),
        ((60, 100, 10, 1.0), "60 of 100, 10 images/s, 4 s left"),
        ((1, 1000, 1, 40.0), "1 of 1000, 0.025 images/s, 11 h 6 min left"),
        ((10, 10, 4, 3.0), "10 of 10, 1.3 images/s, 0 s left"),
        ((3, 10, 0, 3.0), "3 of 10"),
    ],
)
def test_progress_says_how_far_how_fast_and_how_long_still(told: tuple[int, int, int, float], line: str) -> None:
    assert progress(*told) == line
