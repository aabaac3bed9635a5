"""A prompt file becomes a folder of images: which, in which batches, again after any end, and by a cluster."""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from klora import cli
from klora.bulk import Bulk, Draw, run
from klora.bulk.batch import make
from klora.bulk.cluster import TRIES, spread
from klora.bulk.folder import Folder
from klora.bulk.lines import LINE_INPUTS, MAX_LINE_BYTES, Fault, Job, PromptFile, read_prompts
from klora.bulk.run import progress
from klora.cache import Borrowed
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.form.request import Request
from klora.generate import Draw as One
from klora.generate import generate
from klora.models import load_model
from klora.models.family import Family
from klora.studio import Studio
from klora.studio.provenance import picture_sha256, read_provenance
from klora.training.dataset import read_upload
from test_folder import tiny
from test_folder.variants import embeddings

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 2, "disable_safety_checker": True, "output_format": "png"}
PROMPTS = ("a photo of a dog", "a red house by the sea", "two cats")
ONE_LEVEL = 1  # of 255, by which an image in a batch may differ from itself alone: a batched product rounds otherwise


def written(path: Path, *lines: str | Mapping[str, Any]) -> Path:
    """A prompt file."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path, **common: Any) -> PromptFile:
    return read_prompts(path, {**QUICK, "seed": 5, **common})


def requests(prompts: PromptFile) -> list[Request]:
    return [job.request for job in prompts.requests]


# Lines.


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_each_line_is_a_prompt_and_its_seed_is_counted_without_empty_ones(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa dog\r\n\n  a \xc3\xa9clair\xe2\x80\xa8 here \n \t\r\na cat" + end)
    prompts = read(file, style_bias=2)
    assert [(job.index, job.line) for job in prompts.requests] == [(0, 1), (1, 3), (2, 5)]
    assert requests(prompts) == [
        Request(text, seed=seed, style_bias=2, **QUICK)
        for text, seed in (("a dog", 5), ("a éclair\u2028 here", 6), ("a cat", 7))
    ]
    assert (prompts.faults, prompts.empty) == ((), (2, 4))


@pytest.mark.parametrize("name", ["prompts.jsonl", "an upload without a suffix"])
def test_a_line_of_json_says_what_differs_from_the_others(tmp_path: Path, name: str) -> None:
    file = written(
        tmp_path / name,
        {"prompt": "a dog", "style_lora": "oil", "seed": 99, "style_bias": 3},
        "",
        {"prompt": "a cat", "style_lora": None, "width": 80.0, "aspect_ratio": "custom"},
    )
    common = {**QUICK, "style_lora": "ink"}
    assert requests(read(file, style_lora="ink")) == [
        Request("a dog", **{**common, "style_lora": "oil"}, seed=99, style_bias=3.0),
        Request("a cat", **{**common, "style_lora": None}, seed=6, width=80, aspect_ratio="custom"),
    ]


def test_a_template_holds_each_line(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "p.txt", "a dog", "{}"), {}, template="{}, by night {}")
    assert [asked.prompt for asked in requests(prompts)] == ["a dog, by night a dog", "{}, by night {}"]


BAD_LINES = {
    "too long": ("x" * (MAX_LINE_BYTES + 1), f"It has {MAX_LINE_BYTES + 1} bytes. Expected at most {MAX_LINE_BYTES}."),
    "no JSON": ('{"prompt": "a dog"', "It is no JSON: Expecting ',' delimiter at character 19. Expected an object."),
    "no object": ('"a dog"', "It is JSON, but no object. Expected an object of inputs, by name."),
    "unknown": ('{"prompt": "x", "hf_api_token": "secret"}', "'hf_api_token' is no input of a line. Expected prompt, "),
    "a picture": ('{"prompt": "x", "image": "/etc/passwd"}', "'image' is no input of a line. Expected prompt, "),
    "no prompt": ('{"seed": 1}', "It has no prompt. Expected one."),
    "empty prompt": ('{"prompt": " "}', "prompt is empty. Expected what the image shows."),
    "prompt of a kind": ('{"prompt": 5}', "prompt is 5. Expected text."),
    "out of bounds": ('{"prompt": "x", "prompt_strength": 2}', "prompt_strength is 2.0. Expected 0 to 1."),
    "another kind": ('{"prompt": "x", "seed": "one"}', "seed is 'one'. Expected a whole number."),
    "inputs at odds": ('{"prompt": "x", "width": 64, "aspect_ratio": "1:1"}', "width or height is given with"),
    "half a character": ('{"prompt": "\\ud800"}', "It has half a character, as in \\ud800. Expected whole ones."),
    "levels": ('{"prompt": ' + "[" * 4000, "It is JSON in too many levels. Expected an object of inputs."),
    "digits": ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "It has a number that is too large."),
    "fewer digits": ('{"prompt": "x", "style_bias": ' + "9" * 400 + "}", "It has a number that is too large."),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_in_a_sentence_and_keeps_its_place(tmp_path: Path, case: str) -> None:
    line, sentence = BAD_LINES[case]
    prompts = read(written(tmp_path / "prompts.jsonl", {"prompt": "a dog"}, "", line, {"prompt": "a cat"}))
    (fault,) = map(str, prompts.faults)
    assert fault.startswith(f"line 3: {sentence}")
    assert len(fault) < 400 and "secret" not in fault
    assert [(job.index, job.request.seed) for job in prompts.requests] == [(0, 5), (2, 7)]


def test_a_long_value_is_not_printed_whole() -> None:
    assert len(str(Fault(1, "x" * MAX_LINE_BYTES))) < 320


def test_a_plain_line_in_another_encoding_is_a_bad_one(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a dog\n\xe9clair\n")
    assert [*map(str, read(tmp_path / "p.txt").faults)] == ["line 2: It is no UTF-8 text. Expected UTF-8."]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "p.txt has no prompt. Expected one on each line."),
        (b"\n \n\t", "p.txt has no prompt. Expected one on each line."),
        ("a dog\n".encode("utf-16"), "p.txt is UTF-16. Expected UTF-8."),
        (b"a\nb\nc\nd", "p.txt has 4 lines. Expected at most 3."),
        (b"a" * 3 * MAX_LINE_BYTES + b"\n", "p.txt is too large. Expected at most 3 lines of 8192 bytes."),
    ],
)
def test_a_file_of_no_use_is_refused_in_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_prompts(tmp_path / "p.txt", {}, most=3)
    assert str(error.value) == sentence


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60), kind=st.sampled_from(["txt", "jsonl"]))
def test_whatever_a_file_holds_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any.{kind}"
    file.write_bytes(content)
    try:
        prompts = read(file)
    except RequestError:
        return
    assert len(prompts.requests) + len(prompts.faults) == prompts.places


# Order.


def placed(jobs: Sequence[Job]) -> list[tuple[int, str, int]]:
    return [(job.index, job.request.prompt, job.request.seed) for job in jobs]


def test_lines_come_again_with_seeds_that_none_had(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", {"prompt": "a"}, "{", {"prompt": "c", "seed": 0})
    assert placed(read(file).jobs(8)) == [
        (0, "a", 5), (2, "c", 0), (3, "a", 8), (5, "c", 3), (6, "a", 11),
    ]  # fmt: skip
    assert placed(read(file).jobs(1)) == [(0, "a", 5)]
    assert placed(read(file, seed=(1 << 32) - 1).jobs(4)) == [(0, "a", (1 << 32) - 1), (2, "c", 0), (3, "a", 2)]


def test_a_shuffle_changes_the_order_and_nothing_else(tmp_path: Path) -> None:
    prompts = read(written(tmp_path / "p.txt", *(f"prompt {i}" for i in range(20))))
    plain, one, again, other = (Bulk(shuffle=seed).jobs(prompts) for seed in (None, 1, 1, 2))
    assert one == again != other != plain != one
    assert sorted(placed(one)) == placed(plain)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_shards_are_the_whole_and_have_nothing_in_common(tmp_path: Path, shuffle: int | None) -> None:
    prompts = read(written(tmp_path / "p.txt", *(f"prompt {i}" for i in range(7))))
    parts = [Bulk(shard=f"{i}/3", shuffle=shuffle, count=10).jobs(prompts) for i in (1, 2, 3)]
    assert sorted(placed([job for part in parts for job in part])) == placed(prompts.jobs(10))
    assert sorted(map(len, parts)) == [3, 3, 4]


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1/0", "1", "a/b", "-1/2", "1/2/3", ""])
def test_a_shard_that_is_none_is_refused(shard: str) -> None:
    with pytest.raises(RequestError, match=r"^shard is .*\. Expected i/n, with i from 1 to n\.$"):
        Bulk(shard=shard)


def test_a_batch_agrees_in_all_but_prompt_and_seed(tmp_path: Path) -> None:
    styles = ["ink", "oil", "ink", "ink", "oil", "ink"]
    lines = ({"prompt": f"prompt {i}", "style_lora": style, "seed": i * i} for i, style in enumerate(styles))
    prompts = read(written(tmp_path / "p.jsonl", *lines))
    bulk = Bulk(batch_size=3)
    assert [[job.index for job in batch] for batch in bulk.batches(bulk.jobs(prompts))] == [[0, 2, 3], [5], [1, 4]]


@pytest.mark.parametrize("name", [name for name in LINE_INPUTS if name not in ("prompt", "seed")])
def test_no_two_of_a_batch_differ_in_any_other_input(name: str) -> None:
    other = {
        "content_lora": "x", "style_lora": "x", "model": "sdxl", "fusion": "sum", "pattern": "s", "aspect_ratio": "3:2",
        "width": 80, "height": 80, "megapixels": "2", "scheduler": "DDIM", "num_inference_steps": 9, "alpha": 1.0,
        "beta": 1.0, "guidance_scale": 2.0, "negative_prompt": "x", "output_format": "jpg", "output_quality": 9,
    }  # fmt: skip
    default = getattr(Request("a"), name)
    given = {name: other[name] if name in other else not default if isinstance(default, bool) else default + 0.1}
    jobs = [Job(0, 1, Request("a")), Job(1, 2, Request("a", **given))]
    assert len(Bulk().batches(jobs)) == 2


def test_what_a_batch_can_differ_in_is_known_of_every_input() -> None:
    common = {"image", "mask", "num_outputs", "report", "compare", "sweep"}
    assert {*LINE_INPUTS, *common} == {item.name for item in fields(Request)}


# Different prompts in one batch.


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    return {family: load_model(family, bases / base, CPU) for family, base in (("sdxl", "sdxl"), ("flux", "flux-dev"))}


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
HALF = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 64, axis=0).repeat(32, axis=1))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("sdxl", {}),
    "flux": ("flux", {}),
    "negative prompt, noise in each step": ("sdxl", {"negative_prompt": "blurry", "scheduler": "K_EULER_ANCESTRAL"}),
    "image": ("sdxl", {"image": PICTURE, "prompt_strength": 0.7}),
    "mask": ("flux", {"image": PICTURE, "mask": HALF}),
}
DRAWS = [One(prompt, seed) for prompt, seed in zip(PROMPTS, (7, 3, (1 << 32) - 1), strict=True)]


def far(first: Image.Image, second: Image.Image) -> int:
    """In levels of 255."""
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


def compared(model: Family, asked: Request, **loras: Any) -> None:
    """Together and alone."""
    together = generate(model, asked, draws=DRAWS, **loras)
    alone = [generate(model, replace(asked, prompt=one.prompt, seed=one.seed), **loras)[0] for one in DRAWS]
    assert [far(*pair) <= ONE_LEVEL for pair in zip(together, alone, strict=True)] == [True, True, True]
    assert min(far(alone[0], alone[1]), far(alone[1], alone[2])) > 5 * ONE_LEVEL


@pytest.mark.parametrize("kind", KINDS)
def test_three_prompts_in_a_batch_are_the_three_images(models: dict[str, Family], loras: Path, kind: str) -> None:
    family, given = KINDS[kind]
    model = models[family]
    pair = {role: model.read_lora(loras / f"{family}_{role}.safetensors") for role in ("content", "style")}
    compared(model, Request("unused", num_inference_steps=3, **given), **pair)


def test_a_word_that_a_lora_teaches_is_read_in_each_prompt(models: dict[str, Family], loras: Path) -> None:
    model = models["sdxl"]
    vectors = {name: 50 * vector for name, vector in embeddings(model, "text_encoder", "text_encoder_2").items()}
    content = replace(model.read_lora(loras / "sdxl_content.safetensors"), words={"dog": vectors, "cats": vectors})
    asked = Request("unused", num_inference_steps=2)
    compared(model, asked, content=content)
    taught, untaught = (
        generate(model, asked, content=lora, draws=DRAWS) for lora in (content, replace(content, words={}))
    )
    assert [far(*pair) > 5 * ONE_LEVEL for pair in zip(taught, untaught, strict=True)] == [True, False, True]


# Files.


@pytest.fixture(scope="module")
def pair(loras: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SDXL's, the style one with a trigger word in its file."""
    styled = tmp_path_factory.mktemp("styled") / "style.safetensors"
    save_file(load_file(loras / "sdxl_style.safetensors"), styled, {"trigger": "inky", "lora_type": "style"})
    return {"content_lora": loras / "sdxl_content.safetensors", "style_lora": styled}


@pytest.fixture(scope="module")
def studio(bases: Path) -> Studio:
    return Studio(lambda name, family: ("sdxl", "sdxl", bases / "sdxl"), bases / "safety-checker", CPU)


@pytest.fixture
def draw(studio: Studio, pair: dict[str, Path]) -> Draw:
    """Requests with both LoRAs."""
    return lambda asked: studio.draw(asked, pair, {})


Runs = Callable[..., list[str]]


@pytest.fixture
def runs(draw: Draw, tmp_path: Path) -> Runs:
    """Run a prompt file into a folder; what it said."""

    def run_(prompts: PromptFile, out: Path = tmp_path / "out", drawing: Draw | None = draw, **given: Any) -> list[str]:
        said: list[str] = []
        assert drawing is not None
        run(prompts, Bulk(**{"batch_size": 2, **given}), out, lambda: drawing, said.append)
        return said

    return run_


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    return read(written(tmp_path / "prompts.txt", *PROMPTS, "an inky pond", "a toy"))


def pictures(folder: Path) -> dict[str, str]:
    """{name: its pixels} of what is there."""
    return {file.name: picture_sha256(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """{name: (when it was written, content)} of all that is there."""
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_an_image_its_caption_and_how_it_was_made(runs: Runs, prompts: PromptFile, draw: Draw, tmp_path: Path) -> None:
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
    alone = draw([replace(made.request(), content_lora=None, style_lora=None)])[0]
    assert far(alone, Image.open(out / "00001.png")) <= ONE_LEVEL
    assert said[-1] == f"5 images made in {out}."
    assert [line.split(",")[0] for line in said[:-1]] == ["2 of 5", "4 of 5", "5 of 5"]


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
    file = loras / "sdxl_style.safetensors"
    lent = {"style_lora": Borrowed(file, tmp_path / "scores.json", ("zork", "sks"))}
    asked = [Request(prompt, seed=1, **QUICK) for prompt in ("a dog", "a sks cat")]
    images = studio.draw(asked, {"style_lora": file}, lent)
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


# Again.


def test_what_is_lost_is_made_again_to_the_bit_and_no_more(runs: Runs, prompts: PromptFile, tmp_path: Path) -> None:
    runs(prompts)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.json").unlink()
    (tmp_path / "out" / "00004.png").unlink()
    (tmp_path / "out" / ".00001.png.part").write_bytes(b"half a")  # as a kill leaves it
    assert runs(prompts)[-1] == f"2 images made in {tmp_path / 'out'}, 3 were there before."
    after = contents(tmp_path / "out")
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    assert {name for name in before if before[name][0] != after[name][0]} == {
        f"{image}.{suffix}" for image in ("00001", "00004") for suffix in ("png", "txt", "json")
    }


def test_when_all_is_there_nothing_is_opened(runs: Runs, prompts: PromptFile, tmp_path: Path) -> None:
    runs(prompts)

    def opened() -> Draw:
        raise AssertionError("the studio was opened")

    said: list[str] = []
    run(prompts, Bulk(), tmp_path / "out", opened, said.append)
    assert said == [f"0 images made in {tmp_path / 'out'}, 5 were there before."]


@pytest.mark.parametrize("interruption", [SystemExit, RuntimeError])
def test_an_interruption_loses_nothing(
    draw: Draw, prompts: PromptFile, tmp_path: Path, runs: Runs, interruption: type[BaseException]
) -> None:
    def interrupted(asked: Sequence[Request]) -> Mapping[int, Image.Image]:
        if asked[0].prompt == PROMPTS[2]:
            raise interruption
        return draw(asked)

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
        ({"negative_prompt": "x" * 500}, "its negative_prompt is None, and that of line 1 is 'xxx"),
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
def test_a_secret_is_in_no_file_and_no_message(draw: Draw, tmp_path: Path, reference: str) -> None:
    folder, job = Folder(tmp_path), Job(0, 1, Request("a dog", content_lora=reference, seed=1, **QUICK))
    folder.keep(job, draw([replace(job.request, content_lora=None)])[0])
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


# What fails.


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


def test_empty_lines_stop_where_that_is_asked_for(runs: Runs, tmp_path: Path) -> None:
    prompts = read(written(tmp_path / "p.txt", "a dog", "", "a cat", " "))
    assert runs(prompts, count=1)[0] == "Skipped empty lines: 2, 4."
    with pytest.raises(RequestError, match=r"line 2: It is empty\. Expected a prompt\. line 4: It is empty"):
        runs(prompts, on_error="stop")


def failing(draw: Draw, error: KLoRAError, *prompts: str) -> Draw:
    """Fails where a batch has one of these."""

    def draw_(asked: Sequence[Request]) -> Mapping[int, Image.Image]:
        if {request.prompt for request in asked} & {*prompts}:
            raise error
        return draw(asked)

    return draw_


def test_one_prompt_that_cannot_be_read_spoils_no_other(
    runs: Runs, draw: Draw, prompts: PromptFile, tmp_path: Path
) -> None:
    error = RequestError("Both LoRAs teach the word 'red'. Write content:red or style:red in the prompt.")
    said = runs(prompts, drawing=failing(draw, error, PROMPTS[1]), on_error="skip")
    assert said[-1] == f"Not made: line 2: {error}"
    assert sorted(pictures(tmp_path / "out")) == ["00000.png", "00002.png", "00003.png", "00004.png"]


def test_a_lora_that_fails_stops_unless_the_rest_is_to_be_done(
    runs: Runs, draw: Draw, prompts: PromptFile, tmp_path: Path
) -> None:
    drawing = failing(draw, LoRAError("style_lora is no LoRA."), PROMPTS[1])
    said = runs(prompts, drawing=drawing)
    assert said[1] == "Stopped at a line that failed. The same command goes on; on_error skip passes over it."
    assert said[-2:] == [f"Not made: line {line}: style_lora is no LoRA." for line in (1, 2)]
    assert pictures(tmp_path / "out") == {}
    said = runs(prompts, drawing=drawing, on_error="skip")
    assert said[-2:] == [f"Not made: line {line}: style_lora is no LoRA." for line in (1, 2)]
    assert sorted(pictures(tmp_path / "out")) == ["00002.png", "00003.png", "00004.png"]
    assert runs(prompts)[-1] == f"2 images made in {tmp_path / 'out'}, 3 were there before."


def test_withheld_images_are_named_and_not_made_again(
    bases: Path, pair: dict[str, Path], runs: Runs, tmp_path: Path
) -> None:
    checker = tiny.build_safety_checker(tmp_path / "checker", flags=True)
    flagging = Studio(lambda name, family: ("sdxl", "sdxl", bases / "sdxl"), checker, CPU)
    asked: list[int] = []

    def drawing(requests: Sequence[Request]) -> Mapping[int, Image.Image]:
        asked.append(len(requests))
        return flagging.draw(requests, pair, {})

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


# The command.


@pytest.fixture
def shell(bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with LoRAs in it, and the tiny bases installed."""
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for role in ("content", "style"):
        (tmp_path / f"{role}.safetensors").write_bytes((loras / f"sdxl_{role}.safetensors").read_bytes())
    return tmp_path


OPTIONS = ("--num-inference-steps", "2", "--disable-safety-checker", "--model", "sdxl")


def generated(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["generate", *arguments, *OPTIONS])


def test_a_lora_that_is_not_there_in_one_line_of_five(shell: Path) -> None:
    lines: list[dict[str, Any]] = [{"prompt": prompt, "style_lora": "style.safetensors"} for prompt in PROMPTS]
    lines[1]["style_lora"] = "none.safetensors"
    written(shell / "p.jsonl", *lines)
    arguments = ("p.jsonl", "--content-lora", "content.safetensors", "--seed", "3")
    result = generated(*arguments, "--on-error", "skip")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        "2 images made in out.",
        "Not made: line 2: style_lora is 'none.safetensors'. Expected the path of a .safetensors file in the server's "
        "LoRA folder.",
    ]
    made = read_provenance(shell / "out" / "00002.png")
    assert (made.seed, made.inputs["prompt"], made.loras["style_lora"].reference) == (
        5,
        PROMPTS[2],
        "style.safetensors",
    )
    (shell / "none.safetensors").write_bytes((shell / "style.safetensors").read_bytes())
    result = generated(*arguments)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "1 images made in out, 2 were there before.")


def test_a_bad_file_is_one_line_and_status_one(shell: Path) -> None:
    written(shell / "p.jsonl", '{"prompt": "x", "strength": 2}')
    result = generated("p.jsonl")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: Some lines cannot be used: line 1: 'strength' is no input of a line. ")
    assert result.stderr.count("\n") == 1


def test_help_lists_what_holds_for_all_lines(shell: Path) -> None:
    text = CliRunner().invoke(cli.app, ["generate", "--help"]).stdout
    options = {"--out", *(f"--{item.name.replace('_', '-')}" for form in (Bulk, Request) for item in fields(form))}
    absent = {"--prompt", "--num-outputs", "--report", "--compare", "--sweep"}
    assert {option for option in options if f"{option} " in text} == options - absent


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_made_and_says_how_to_go_on(shell: Path, number: signal.Signals, status: int) -> None:
    written(shell / "p.txt", *(f"prompt {i}" for i in range(40)))
    arguments = ["generate", "p.txt", "--batch-size", "1", *OPTIONS[2:], "--num-inference-steps", "12"]
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT), 1)
            sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
            cli.app(arguments)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    while not (shell / "out" / "00001.json").exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    made = len(pictures(shell / "out"))
    assert 2 <= made < 40
    said = (shell / "said.txt").read_text().splitlines()
    assert said[-1] == f"Interrupted: {made} of 40 are in out. The same command goes on."
    assert {path.suffix for path in (shell / "out").iterdir()} <= {".png", ".txt", ".json"}


# A cluster.


def test_without_ray_it_is_said_how_to_get_it(prompts: PromptFile, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"^Ray is not installed\. Expected it on all nodes: pip install ray$"):
        runs(prompts, ray=True)


@pytest.fixture(scope="module")
def ray(bases: Path) -> Iterator[Any]:
    """A cluster of this machine alone: two workers at a time."""
    # Its sockets' names are too long below a test's own folder.
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as own,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("KLORA_MODELS", str(bases))
        ray = pytest.importorskip("ray")
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=2, _temp_dir=own, **quiet)
        yield ray
        ray.shutdown()


def opened_with_another(folder: Path) -> Draw:
    """The command's, in a worker that says who it is and when it is at work, and begins when there are two."""
    own = folder / str(os.getpid())
    own.touch()
    draw = cli.open_studio()
    while len(list(folder.glob("[0-9]*"))) < 2:
        time.sleep(0.01)

    def draw_(asked: Sequence[Request]) -> Mapping[int, Image.Image]:
        own.write_text("at work")
        images = draw(asked)
        own.write_text("")
        return images

    return draw_


def test_a_worker_that_is_killed_at_work_loses_nothing_and_nothing_is_made_twice(shell: Path, ray: Any) -> None:
    given = {"model": "sdxl", "content_lora": "content.safetensors", "style_lora": "style.safetensors"}
    prompts = read(written(shell / "p.txt", *(f"prompt {i}" for i in range(12))), num_inference_steps=10, **given)
    batches = Bulk(batch_size=2).batches(prompts.jobs())
    for folder in ("workers", "out", "whole"):
        (shell / folder).mkdir()
    ended, killed, before = [], 0, dict[str, tuple[int, bytes]]()
    for outcome in spread(batches, partial(opened_with_another, shell / "workers"), Folder(shell / "out"), workers=2):
        ended.append(outcome)
        working = [int(worker.name) for worker in (shell / "workers").iterdir() if worker.read_text()]
        if working and not killed:
            killed = working[0]
            os.kill(killed, signal.SIGKILL)
            before = contents(shell / "out")
    assert killed
    assert [sorted(place for outcome in ended for place in outcome.there), ended[0].faults] == [list(range(12)), []]
    after = contents(shell / "out")
    assert {name: after[name] for name in before if name.endswith(".json")} == {
        name: content for name, content in before.items() if name.endswith(".json")
    }
    draw = cli.open_studio()
    for batch in batches:
        make(batch, draw, Folder(shell / "whole"))
    assert len(pictures(shell / "out")) == 12
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in contents(shell / "whole").items()
    }


class DiedError(Exception):
    """A worker's process is gone."""


class FailedError(Exception):
    """What a worker raised, as Ray hands it over."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@dataclass
class Cluster:
    """As much of Ray as is used: calls are made when their results are asked for, the first one first."""

    gpus: int = 0
    hired: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    exceptions = SimpleNamespace(RayActorError=DiedError, RayTaskError=FailedError)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}, {"Alive": False}, {"Alive": True}]

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options: Any) -> Callable[[type], Any]:
        def later(call: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: partial(call, *arguments))

        def hire(kind: type, *arguments: Any) -> Any:
            self.hired.append(options)
            worker = kind(*arguments)
            return SimpleNamespace(start=later(worker.start), make=later(worker.make))

        return lambda kind: SimpleNamespace(remote=partial(hire, kind))

    def wait(self, calls: list[Any]) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Any) -> Any:
        try:
            return call()
        except KLoRAError as error:
            raise FailedError(error) from error

    def kill(self, worker: Any) -> None:
        self.gone += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "ray", cluster)
    return cluster


def deadly(draw: Draw, prompt: str, times: int) -> Draw:
    """Kills its worker at a prompt, so many times."""
    left = [times]

    def draw_(asked: Sequence[Request]) -> Mapping[int, Image.Image]:
        if left[0] and prompt in {request.prompt for request in asked}:
            left[0] -= 1
            raise DiedError
        return draw(asked)

    return draw_


def test_a_batch_whose_workers_die_is_given_up_after_some_tries_and_the_rest_is_made(
    cluster: Cluster, runs: Runs, draw: Draw, prompts: PromptFile, tmp_path: Path
) -> None:
    said = runs(prompts, drawing=deadly(draw, PROMPTS[2], TRIES), ray=True, on_error="skip")
    sentence = f"Its worker died, {TRIES} times. Expected more memory, or a smaller batch_size."
    assert said[-2:] == [f"Not made: line {line}: {sentence}" for line in (3, 4)]
    assert sorted(pictures(tmp_path / "out")) == ["00000.png", "00001.png", "00004.png"]
    assert len(cluster.hired) == 2 + TRIES and cluster.gone == 2
    assert runs(prompts, drawing=deadly(draw, PROMPTS[2], TRIES - 1), ray=True)[-1].startswith("2 images made")


def test_each_gpu_has_a_worker_or_else_each_node_and_never_more_than_batches(
    cluster: Cluster, runs: Runs, prompts: PromptFile, tmp_path: Path
) -> None:
    def hired(out: str, **given: Any) -> list[dict[str, Any]]:
        cluster.hired.clear()
        runs(prompts, tmp_path / out, ray=True, batch_size=1, count=4, **given)
        return cluster.hired

    on_cpu = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    assert hired("nodes") == [on_cpu] * 2
    assert hired("asked for", ray_workers=3) == [on_cpu] * 3
    cluster.gpus = 3
    assert hired("gpus") == [{"num_gpus": 1}] * 3
    cluster.gpus = 16
    assert hired("more than batches") == [{"num_gpus": 1}] * 4


def test_workers_that_cannot_start_stop_all_and_say_why(cluster: Cluster, prompts: PromptFile, tmp_path: Path) -> None:
    def dying() -> Draw:
        raise DiedError

    def refusing() -> Draw:
        raise LoRAError("style_lora is no LoRA.")

    batches = Bulk().batches(prompts.jobs())
    with pytest.raises(RequestError, match=rf"^Ray's workers die as they start, {TRIES} times: see Ray's logs\.$"):
        list(spread(batches, dying, Folder(tmp_path)))
    with pytest.raises(LoRAError, match=r"^style_lora is no LoRA\.$"):
        list(spread(batches, refusing, Folder(tmp_path)))
    with pytest.raises(
        RequestError, match=r"/none is not on every node of the cluster\. Expected a folder that all share\."
    ):
        list(spread(batches, dying, Folder(tmp_path / "none")))
