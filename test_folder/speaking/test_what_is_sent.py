"""The playground's form is the schema's, and what is filled in becomes inputs."""

import base64
from pathlib import Path
from typing import Any

import pytest

from klora.sources.reference import MAX_DATA_CHARACTERS
from playground.cog import CogServer
from playground.connection import Connection
from playground.dial import heeded, knob
from playground.errors import PlaygroundError
from playground.form import Field, Kind, inputs_of, read_form
from playground.trained import MOST_CHARACTERS, handed_over
from test_folder.speaking.answering import SCHEMAS, answering


def test_the_form_is_the_schemas_without_what_is_deprecated() -> None:
    fields = read_form(SCHEMAS, "Input")
    by_name = {field.name: field for field in fields}
    assert [field.name for field in fields[:3]] == ["prompt", "content_lora", "style_lora"]
    assert by_name["prompt"].required
    assert "lora_weights" not in by_name
    assert by_name["pattern"].choices == ("auto", "s", "s*")
    assert by_name["hf_api_token"].kind is Kind.SECRET
    assert (by_name["image"].kind, by_name["image"].accept) == (Kind.FILE, "image/*")
    assert by_name["content_scale"].blank == 1
    assert by_name["beta"].blank is None, "it means one number for s and another for s*"
    assert (by_name["style_bias"].minimum, by_name["style_bias"].maximum) == (0, 10)


@pytest.mark.parametrize(
    ("document", "lacking"),
    [
        ({}, "Input"),
        ({"components": {"schemas": {"Item": {}}}}, "Input"),
        ({"components": {"schemas": {"Input": {"properties": {"prompt": {"type": "string"}}}}}}, "style_bias"),
    ],
)
def test_a_server_of_something_else_is_told_as_such(document: dict[str, Any], lacking: str) -> None:
    with answering(lambda *_: (200, document)) as server:
        schemas, form = CogServer(Connection(server.url)).schemas()
    with pytest.raises(PlaygroundError, match=rf"has no {lacking}\. Expected a server of K-LoRA\.$"):
        knob(read_form(schemas, form))


def test_blanks_stay_away_and_numbers_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    given: dict[str, Any] = {
        "prompt": "x", "content_lora": "", "model": "", "content_scale": 1, "style_scale": 2, "seed": " 7 ",
        "num_inference_steps": "", "go_fast": False, "image": str(tmp_path / "a.png"), "guidance_scale": "3.5",
        "hf_api_token": None,
    }  # fmt: skip
    fields = {field.name: field for field in read_form(SCHEMAS, "Input")}
    sent = inputs_of([fields[name] for name in given], given.values())
    image = "data:image/png;base64," + base64.b64encode(b"png").decode()
    numbers = {"style_scale": 2.0, "seed": 7, "guidance_scale": 3.5}
    assert sent == {"prompt": "x", "go_fast": False, "image": image} | numbers
    assert isinstance(sent["style_scale"], float)


@pytest.mark.parametrize("other", [{"fusion": "sum"}, {"fusion": "content"}, {"style_lora": ""}])
def test_what_the_slider_says_is_sent_where_it_has_a_say(other: dict[str, str]) -> None:
    """The server refuses it elsewhere, and the page keeps it."""
    asked = {"content_lora": "a", "style_lora": "b", "fusion": "klora", "style_scale": 2.0}
    choice = {"pattern": "s", "style_bias": 2.0, "alpha": 1.0, "beta": 0.5}
    assert heeded(asked | choice) == asked | choice
    assert heeded(asked | choice | other) == asked | other
    sheet = {name: value for name, value in asked.items() if name != "fusion"} | {"compare": True, "style_bias": 2.0}
    assert heeded(sheet) == sheet


def test_a_number_that_is_none_is_refused() -> None:
    seed = Field("seed", Kind.INTEGER, "", None, required=False)
    with pytest.raises(PlaygroundError, match=r"seed is 'seven'\. Expected a whole number\."):
        inputs_of([seed], ["seven"])


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999", "half"])
def test_a_number_that_json_cannot_say_is_refused_by_its_inputs_name(text: str) -> None:
    decay = Field("weight_decay", Kind.NUMBER, "", None, required=False)
    with pytest.raises(PlaygroundError, match=rf"^weight_decay is '{text}'\. Expected a finite number\.$"):
        inputs_of([decay], [text])


@pytest.mark.parametrize("value", ["nan", "inf", float("inf"), float("nan"), "2.5"])
def test_no_whole_number_is_one_that_is_no_number(value: Any) -> None:
    seed = Field("seed", Kind.INTEGER, "", None, required=False)
    with pytest.raises(PlaygroundError, match=r"Expected a whole number\.$"):
        inputs_of([seed], [value])


def test_a_slider_comes_to_a_standstill_at_its_bounds_and_at_its_beginning() -> None:
    fields = [field for form in ("Input", "TrainingInput") for field in read_form(SCHEMAS, form)]
    numbers = {field.name: field for field in fields if field.kind in (Kind.INTEGER, Kind.NUMBER)}
    for field in numbers.values():
        starts = (field.default, field.blank, field.maximum)
        places = [(end - field.minimum) / field.step for end in starts if end is not None]
        assert all(abs(place - round(place)) < 1e-6 * max(1, place) for place in places), field.name
    steps = {name: numbers[name].step for name in ("weight_decay", "ema_decay", "content_scale", "alpha", "steps")}
    assert steps == {"weight_decay": 0.0001, "ema_decay": 0.0001, "content_scale": 0.05, "alpha": 0.05, "steps": 1}
    assert isinstance(numbers["steps"].step, int)


def test_two_loras_of_one_name_stay_two() -> None:
    name, first, second = "trained here: subject, 0.5 MB", "data:;base64,AAAA", "data:;base64,BBBB"
    content, trained = handed_over((name, first), {})
    style, trained = handed_over((name, second), trained)
    assert (content, style) == (name, f"{name} (2)")
    assert (trained[content], trained[style]) == (first, second)
    assert handed_over((name, second), trained) == (style, trained), "the same again has the same name"
    assert handed_over((name, "https://example.com/lora.tar"), trained) == ("https://example.com/lora.tar", trained)


def test_what_is_handed_over_is_what_the_server_takes() -> None:
    assert MOST_CHARACTERS == MAX_DATA_CHARACTERS
