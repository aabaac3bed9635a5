"""The form: what script/schema makes of predict.py and train.py, what a server shows of it, and that it is no lie."""

import json
from typing import Any

import pytest
from in_venv import ROOT, program

from test_folder.conformance.client import REFUSAL, Client

GOLDEN = ROOT / "test_folder" / "golden" / "openapi_schema.json"
INPUTS = {"Input": "prompt", "TrainingInput": "input_images"}
NUMBERS = ("integer", "number")

every_form = pytest.mark.parametrize("component", INPUTS)


def written() -> dict[str, Any]:
    """The document as `cog build` would write it."""
    return program("schema").schema_of(ROOT)


def inputs(document: dict[str, Any], component: str) -> dict[str, dict[str, Any]]:
    """The inputs of a form by name, each with its choices, which the document keeps elsewhere."""
    schemas = document["components"]["schemas"]
    fields = schemas[component]["properties"]
    return {name: schemas[name] | field if "allOf" in field else field for name, field in fields.items()}


def test_the_form_is_the_one_that_was_agreed_on() -> None:
    """A change of the form is meant: renew it by `script/schema && cp .cog/openapi_schema.json test_folder/golden/`."""
    assert written() == json.loads(GOLDEN.read_text())


@every_form
def test_the_form_has_one_required_input_and_an_order(component: str) -> None:
    form = written()["components"]["schemas"][component]
    assert form["required"] == [INPUTS[component]]
    assert [field["x-order"] for field in form["properties"].values()] == list(range(len(form["properties"])))


@every_form
def test_every_input_is_a_plain_value_that_a_form_can_show(component: str) -> None:
    """No lists and no objects: a web form would ask for JSON."""
    fields = inputs(written(), component)
    assert {field["type"] for field in fields.values()} <= {"string", "boolean", *NUMBERS}
    unbounded = [n for n, f in fields.items() if f["type"] in NUMBERS and not {"minimum", "maximum"} <= f.keys()]
    undescribed = [name for name, field in fields.items() if not field["description"].endswith(".")]
    assert (unbounded, undescribed) == ([], [])


def test_what_comes_out_is_files() -> None:
    schemas = written()["components"]["schemas"]
    file = {"type": "string", "format": "uri"}
    assert schemas["Output"] == {"type": "array", "items": file, "title": "Output"}
    assert schemas["TrainingOutput"]["properties"] == {"weights": file | {"title": "Weights"}}


def test_a_server_shows_the_form_as_it_was_written(server: Client) -> None:
    assert server.call("GET", "/openapi.json") == (200, written())


def some_value(field: dict[str, Any]) -> Any:
    """One that the schema allows."""
    if field.get("default") not in (None, ""):
        return field["default"]
    if "enum" in field:
        return field["enum"][0]
    return {"boolean": True, "string": "x"}.get(field["type"], field.get("minimum"))


def test_a_server_takes_every_input_that_the_form_names(server: Client) -> None:
    """Each alone, with what makes the request fail as soon as it has begun: the schema and the function take them."""
    form = inputs(server.call("GET", "/openapi.json")[1], server.mode.component)
    answers = {name: server.post({name: some_value(field)} | server.mode.faulty) for name, field in form.items()}
    strange = {
        name: answer
        for name, (status, answer) in answers.items()
        if status != 200 or not REFUSAL.fullmatch(answer["error"]) or "TypeError" in answer["error"]
    }
    assert strange == {}
    assert len(answers) > 30
