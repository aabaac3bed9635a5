"""The folder of images that a prompt file becomes, and the same again after any end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klora.bulk.batch import DrawBatch
from klora.bulk.batches import Bulk
from klora.bulk.folder import Folder
from klora.bulk.lines import Job, PromptFile
from klora.bulk.run import run
from klora.cache import Borrowed
from klora.errors import RequestError
from klora.form.request import Request
from klora.studio import Check, Studio
from klora.studio.provenance import read_provenance
from klora.training.dataset import read_upload
from test_folder.bulk.prompting import (
    ONE_LEVEL,
    PROMPTS,
    QUICK,
    Runs,
    contents,
    far,
    pictures,
    read,
    unchecked,
    written,
)
from test_folder.pairs import pair_of


def test_an_image_its_caption_and_how_it_was_made(
    runs: Runs, prompts: PromptFile, draw: DrawBatch, tmp_path: Path
) -> None:
    said = runs(prompts)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        f"0000{i}.{suffix}" for i in range(5) for suffix in ("json", "png", "txt")
    ]
    assert (out / "00001.txt").read_text() == "a red house by the sea, inky style"
    assert (out / "00003.txt").read_text() == "an inky pond"
    told = json.loads((out / "00001.json").read_text())
    made = read_provenance(out / "00001.png")
    assert (told["seed"], told["inputs"]["prompt"], told["line"]) == (6, "a red house by the sea", 2)
    assert told["loras"]["style_lora"]["sha256"] == list(made.loras["style_lora"].sha256)
    assert 0 < told["measured"]["style_share"] == made.measured["style_share"] < 1
    asked = replace(made.request(content_lora="hf:o/x", style_lora="hf:o/x"), content_lora=None, style_lora=None)
    alone = draw([asked], unchecked)[0]
    assert far(alone, Image.open(out / "00001.png")) <= ONE_LEVEL
    assert said[-1] == f"5 images made in {out}."
    assert [line.split(",")[0] for line in said[:-1]] == ["2 of 5", "4 of 5", "5 of 5"]


def test_an_image_is_there_once_its_record_is(tmp_path: Path) -> None:
    folder, job = Folder(tmp_path), Job(0, 1, Request("a dog", output_format="png"))
    for name, there in (("00000.png", False), ("00000.txt", False), ("00000.json", True)):
        (tmp_path / name).touch()
        assert folder.shows(job) == there


def test_the_folder_is_a_training_set(runs: Runs, prompts: PromptFile, tmp_path: Path) -> None:
    runs(prompts)
    found, skipped = read_upload(tmp_path / "out")
    assert [(picture.name, picture.caption) for picture in found][1:4] == [
        ("00001.png", "a red house by the sea, inky style"),
        ("00002.png", "two cats, inky style"),
        ("00003.png", "an inky pond"),
    ]
    assert {item.name.rpartition(".")[2] for item in skipped} == {"json"}


def test_the_word_that_a_page_names_is_chosen_for_each_prompt(studio: Studio, loras: Path, tmp_path: Path) -> None:
    lent = Borrowed(loras / "sdxl_style.safetensors", tmp_path / "scores.json", ("zork", "sks"))
    asked = [Request(prompt, seed=1, **QUICK) for prompt in ("a dog", "a sks cat")]
    images = studio.draw(asked, pair_of(loras) | {"style_lora": lent}, unchecked)
    assert lent.scores.exists()  # for the next time
    assert [images[place].info["caption"] for place in (0, 1)] == ["zork, a dog", "a sks cat"]
    assert [images[place].info["provenance"].loras["style_lora"].trigger for place in (0, 1)] == ["zork", "sks"]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_images_come_in_the_format_that_is_asked_for(runs: Runs, tmp_path: Path, kind: str) -> None:
    prompts = read(written(tmp_path / "p.txt", "a dog"), output_format=kind)
    runs(prompts)
    with Image.open(tmp_path / "out" / f"00000.{kind}") as image:
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
    assert read_provenance(tmp_path / "out" / f"00000.{kind}").inputs["prompt"] == "a dog"
    assert runs(prompts)[-1].startswith("0 images made")


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_images_are_of_the_quality_that_is_asked_for(runs: Runs, tmp_path: Path, kind: str) -> None:
    for quality in (10, 90):
        asked = {"output_format": kind, "output_quality": quality}
        runs(read(written(tmp_path / "p.txt", "a dog"), **asked), tmp_path / str(quality))
    low, high = (tmp_path / name / f"00000.{kind}" for name in ("10", "90"))
    assert low.stat().st_size < high.stat().st_size


# Again.


def test_an_image_without_its_caption_is_not_done(runs: Runs, prompts: PromptFile, tmp_path: Path) -> None:
    (blocked := tmp_path / "out" / ".00001.txt.part").mkdir(parents=True)
    with pytest.raises(OSError, match="00001"):
        runs(prompts)
    blocked.rmdir()
    runs(prompts)
    assert (tmp_path / "out" / "00001.txt").read_text() == "a red house by the sea, inky style"


def test_what_is_lost_is_made_again_to_the_bit_and_no_more(
    runs: Runs, draw: DrawBatch, prompts: PromptFile, tmp_path: Path
) -> None:
    """In the batches of the first time, lest it be rounded otherwise."""
    batches: list[list[str]] = []

    def drawing(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        batches.append([one.prompt for one in asked])
        return draw(asked, check)

    runs(prompts)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.json").unlink()
    (tmp_path / "out" / "00004.png").unlink()
    (tmp_path / "out" / ".00001.png.part").write_bytes(b"half a")  # as a kill leaves it
    assert runs(prompts, drawing=drawing)[-1] == f"2 images made in {tmp_path / 'out'}, 3 were there before."
    assert batches == [[*PROMPTS[:2]], ["a toy"]]
    after = contents(tmp_path / "out")
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    assert {name for name in before if before[name][0] != after[name][0]} == {
        f"{image}.{suffix}" for image in ("00001", "00004") for suffix in ("png", "txt", "json")
    }


def test_when_all_is_there_nothing_is_opened(runs: Runs, prompts: PromptFile, tmp_path: Path) -> None:
    runs(prompts)

    def opened() -> DrawBatch:
        raise AssertionError("the studio was opened")

    said: list[str] = []
    run(prompts, Bulk(), tmp_path / "out", opened, said.append)
    assert said == [f"0 images made in {tmp_path / 'out'}, 5 were there before."]


@pytest.mark.parametrize("interruption", [SystemExit, RuntimeError])
def test_an_interruption_loses_nothing(
    draw: DrawBatch, prompts: PromptFile, tmp_path: Path, runs: Runs, interruption: type[BaseException]
) -> None:
    def interrupted(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        if asked[0].prompt == PROMPTS[2]:
            raise interruption
        return draw(asked, check)

    said: list[str] = []
    with pytest.raises(interruption):
        run(prompts, Bulk(batch_size=2), tmp_path / "out", lambda: interrupted, said.append)
    before = contents(tmp_path / "out")
    assert before.keys() == {f"{i}.{suffix}" for i in ("00000", "00001") for suffix in ("png", "txt", "json")}
    if interruption is not RuntimeError:
        assert said[-1] == f"Interrupted: 2 of 5 are in {tmp_path / 'out'}. The same command goes on."
    runs(prompts)
    assert {name: contents(tmp_path / "out")[name] for name in before} == before
    runs(prompts, tmp_path / "whole")
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"num_inference_steps": 3}, "its num_inference_steps is 2, and that of line 1 is 3."),
        ({"seed": 6}, "its seed is 5, and that of line 1 is 6."),
        ({"content_lora": "hf:some/one"}, "its content_lora is None, and that of line 1 is 'hf:some/one'."),
        ({"output_format": "jpg"}, "its output_format is 'png', and that of line 1 is 'jpg'."),
        ({"output_format": "webp"}, "its output_format is 'png', and that of line 1 is 'webp'."),
        ({"negative_prompt": "x" * 500}, "its negative_prompt is '', and that of line 1 is 'xxx"),
    ],
)
def test_images_of_another_request_are_not_mixed_in(
    runs: Runs, prompts: PromptFile, tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    runs(prompts, count=1)
    before = contents(tmp_path / "out")
    with pytest.raises(RequestError) as error:
        runs(read(tmp_path / "prompts.txt", **change))
    assert str(error.value).startswith(f"{tmp_path / 'out' / '00000.json'} is another request's: {difference}")
    assert len(str(error.value)) < 500
    assert contents(tmp_path / "out") == before


SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("reference", [f"https://civitai.com/api/download/models/7?token={SECRET}", f"hf_{SECRET}"])
def test_a_secret_is_in_no_file_and_no_message(draw: DrawBatch, tmp_path: Path, reference: str) -> None:
    folder, job = Folder(tmp_path), Job(0, 1, Request("a dog", content_lora=reference, seed=1, **QUICK))
    folder.keep(job, draw([replace(job.request, content_lora=None)], unchecked)[0])
    assert folder.done(job)
    assert len(list(tmp_path.iterdir())) == 3
    assert not [file for file in tmp_path.iterdir() if SECRET.encode() in file.read_bytes()]
    with pytest.raises(RequestError) as error:
        folder.done(replace(job, request=replace(job.request, content_lora="hf:some/one")))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", "[" * 100_000, "\udcff"])
def test_a_record_that_is_none_is_not_written_over(
    runs: Runs, prompts: PromptFile, tmp_path: Path, content: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00002.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match=r"00002\.json is no record of klora generate\. Expected an empty folder\.$"):
        runs(prompts)


def test_a_caption_of_somebody_elses_picture_is_not_written_over(
    runs: Runs, prompts: PromptFile, tmp_path: Path
) -> None:
    """A folder of a training set has such names, and its pictures may be of another format than ours."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00002.txt").write_text("my dog")
    with pytest.raises(
        RequestError, match=r"00002\.txt is no caption of klora generate's\. Expected an empty folder\.$"
    ):
        runs(prompts)
    assert contents(tmp_path / "out").keys() == {"00002.txt"}
