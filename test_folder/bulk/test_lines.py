"""A prompt file is read: what each line asks for, in which order, and in which batches."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klora.bulk.batches import Bulk
from klora.bulk.lines import LINE_INPUTS, MAX_LINE_BYTES, Fault, Job, PromptFile, read_prompts
from klora.errors import RequestError
from klora.form.request import Request
from test_folder.bulk.prompting import QUICK, read, written


def requests(prompts: PromptFile) -> list[Request]:
    return [job.request for job in prompts.requests]


# Lines.


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_each_line_is_a_prompt_and_its_seed_is_counted_without_empty_ones(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa dog\r\n\n  a \xc3\xa9clair\xe2\x80\xa8 here \n \t\r\na cat" + end)
    prompts = read(file, style_scale=2)
    assert [(job.index, job.line) for job in prompts.requests] == [(0, 1), (1, 3), (2, 5)]
    assert requests(prompts) == [
        Request(text, seed=seed, style_scale=2, **QUICK)
        for text, seed in (("a dog", 5), ("a éclair\u2028 here", 6), ("a cat", 7))
    ]
    assert (prompts.faults, prompts.empty) == ((), (2, 4))


def test_lines_may_end_as_on_an_old_macintosh(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a dog\ra cat\r")
    assert [request.prompt for request in requests(read(tmp_path / "prompts.txt"))] == ["a dog", "a cat"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "an upload without a suffix"])
def test_a_line_of_json_says_what_differs_from_the_others(tmp_path: Path, name: str) -> None:
    file = written(
        tmp_path / name,
        {"prompt": "a dog", "style_lora": "oil", "seed": 99, "style_scale": 3},
        "",
        {"prompt": "a cat", "style_lora": None, "width": 80.0, "aspect_ratio": "custom"},
    )
    common = {**QUICK, "style_lora": "ink"}
    assert requests(read(file, style_lora="ink")) == [
        Request("a dog", **{**common, "style_lora": "oil"}, seed=99, style_scale=3.0),
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
    "half a character": ('{"prompt": "\\ud800"}', "prompt has half a character in it. Expected text."),
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


@pytest.mark.parametrize("case", ["unknown", "a picture", "half a character", "no JSON", "no object", "no prompt"])
def test_an_upload_without_a_suffix_whose_first_line_is_a_bad_object_is_not_taken_for_text(
    tmp_path: Path, case: str
) -> None:
    line, sentence = BAD_LINES[case]
    prompts = read(written(tmp_path / "upload", line, {"prompt": "a cat"}))
    assert [str(fault).startswith(f"line 1: {sentence}") for fault in prompts.faults] == [True]
    assert [asked.prompt for asked in requests(prompts)] == ["a cat"]


def test_a_prompt_of_brackets_is_a_prompt(tmp_path: Path) -> None:
    assert [asked.prompt for asked in requests(read(written(tmp_path / "p.txt", "[" * 4000)))] == ["[" * 4000]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_object_among_lines_of_text_is_a_bad_line(tmp_path: Path, place: int) -> None:
    """And no prompt, which would be drawn."""
    lines = ["a dog", "{a, b}"]
    lines.insert(place, '{"prompt": "a cat"}')
    read_file = read_prompts(written(tmp_path / "mixed.txt", *lines), QUICK)
    assert [job.request.prompt for job in read_file.requests] == ["a dog", "{a, b}"]
    sentence = "It is JSON, but most lines of the file are text. Expected all lines of one kind."
    assert read_file.faults == (Fault(place + 1, sentence),)


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
        (b"a" * 3 * (MAX_LINE_BYTES + 2) + b"\n", "p.txt is too large. Expected at most 3 lines of 8192 bytes."),
    ],
)
def test_a_file_of_no_use_is_refused_in_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(RequestError) as error:
        read_prompts(tmp_path / "p.txt", {}, most=3)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("name", "lines"), [("p.csv", ["prompt,seed", "a dog,3"]), ("p.TSV", ["a dog\t3"]), ("p.json", ["[", '"a dog"]'])]
)
def test_a_table_is_not_drawn_row_by_row(tmp_path: Path, name: str, lines: list[str]) -> None:
    with pytest.raises(RequestError, match=rf"^{name} is a table or JSON\. Expected a prompt on each line of a \.txt"):
        read(written(tmp_path / name, *lines))


def test_lines_of_objects_are_read_under_any_name(tmp_path: Path) -> None:
    assert [asked.prompt for asked in requests(read(written(tmp_path / "p.json", {"prompt": "a dog"})))] == ["a dog"]


def test_as_many_lines_as_may_be_and_as_long_ones_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"".join(letter * MAX_LINE_BYTES + b"\r\n" for letter in (b"a", b"b", b"c")))
    prompts = read_prompts(tmp_path / "p.txt", {}, most=3)
    assert (len(prompts.requests), prompts.faults) == (3, ())


def test_an_upload_is_called_what_its_sender_calls_it(tmp_path: Path) -> None:
    (tmp_path / "tmp01234567file.txt").write_bytes(b"a\nb")
    with pytest.raises(RequestError, match=r"^prompts has 2 lines\. Expected at most 1\.$"):
        read_prompts(tmp_path / "tmp01234567file.txt", {}, most=1, called="prompts")


@settings(max_examples=50)
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


@pytest.mark.parametrize(
    ("seeds", "drawn"),
    [
        ([7, 9], [7, 9, 10, 11, 12, 13]),
        ([9, 7], [9, 7, 11, 10, 13, 12]),
        ([0, 2, 4], [0, 2, 4, 3, 5, 7, 6, 8, 10]),
        ([3, 3], [3, 3, 5, 6, 7, 8]),
        ([None, 5], [5, 5, 7, 8, 9, 10]),
        ([8, 6], [8, 6, 10, 9, 12, 11]),
        ([None, 7, None], [5, 7, 7, 8, 12, 10, 11, 15, 13]),
        ([(1 << 32) - 1, 1], [(1 << 32) - 1, 1, 2, 3, 4, 5]),
        ([None, None], [5, 6, 7, 8, 9, 10]),
    ],
    ids=str,
)
def test_no_image_comes_again_where_lines_of_the_same_inputs_name_seeds(
    tmp_path: Path, seeds: list[int | None], drawn: list[int]
) -> None:
    file = written(
        tmp_path / "p.jsonl", *({"prompt": "a"} | ({} if seed is None else {"seed": seed}) for seed in seeds)
    )
    assert [job.request.seed for job in read(file).jobs(len(drawn))] == drawn
    for count in range(1, len(drawn)):
        assert [job.request.seed for job in read(file).jobs(count)] == drawn[:count]


@settings(max_examples=50)
@given(
    lines=st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.integers(0, 12)), min_size=1, max_size=6),
    seed=st.sampled_from([0, 5, (1 << 32) - 3]),
)
def test_no_turn_has_a_seed_of_a_turn_before_and_one_that_is_not_named_is_counted(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, int | None]], seed: int
) -> None:
    objects = [{"prompt": prompt} | ({} if named is None else {"seed": named}) for prompt, named in lines]
    jobs = read(written(tmp_path_factory.getbasetemp() / "p.jsonl", *objects), seed=seed).jobs(5 * len(lines))
    named = {(prompt, own) for prompt, own in lines if own is not None}
    seen = set[tuple[str, int]]()
    for turn in range(5):
        now = [(job.request.prompt, job.request.seed) for job in jobs[turn * len(lines) : (turn + 1) * len(lines)]]
        for (_, own), drawn, job in zip(lines, now, jobs[turn * len(lines) :], strict=False):
            assert own is not None or drawn[1] == (seed + job.index) % (1 << 32)
            assert drawn not in seen or (own is None and drawn in named)  # which the file itself asks for twice
        seen |= {*now}
        assert not turn or len({*now}) == len(now)


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
