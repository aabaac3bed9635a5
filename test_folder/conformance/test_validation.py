"""What is refused before it begins: by the form's schema, or because it is no request at all. In either mode."""

from typing import Any

import pytest

from test_folder.conformance.client import Client

# Case: for each mode an input, its value, and what is said of it.
REFUSED: dict[str, dict[str, tuple[str, Any, str]]] = {
    "above the maximum": {
        "predictions": ("num_outputs", 5, "5 is greater than the maximum of 4"),
        "trainings": ("batch_size", 17, "17 is greater than the maximum of 16"),
    },
    "below the minimum": {
        "predictions": ("style_bias", -1, "-1 is less than the minimum of 0"),
        "trainings": ("steps", 0, "0 is less than the minimum of 1"),
    },
    "no choice": {
        "predictions": ("fusion", "blend", '"blend" is not one of ["klora","sum","content","style"]'),
        "trainings": ("lora_type", "pet", '"pet" is not one of ["subject","style"]'),
    },
    "text for a whole number": {
        "predictions": ("num_inference_steps", "2", '"2" is not of type "integer"'),
        "trainings": ("lora_rank", "2", '"2" is not of type "integer"'),
    },
    "fraction for a whole number": {
        "predictions": ("seed", 1.5, '1.5 is not of type "integer"'),
        "trainings": ("seed", 1.5, '1.5 is not of type "integer"'),
    },
    "number for a text": {
        "predictions": ("prompt", 1, '1 is not of type "string"'),
        "trainings": ("trigger_word", 1, '1 is not of type "string"'),
    },
    "text for yes or no": {
        "predictions": ("go_fast", "yes", '"yes" is not of type "boolean"'),
        "trainings": ("horizontal_flip", "yes", '"yes" is not of type "boolean"'),
    },
    "null": {
        "predictions": ("seed", None, 'null is not of type "integer"'),
        "trainings": ("seed", None, 'null is not of type "integer"'),
    },
}


def said(answer: dict[str, Any]) -> dict[str, str]:
    """{input: what is wrong with it}."""
    assert all(error["loc"][:2] == ["body", "input"] for error in answer["detail"])
    return {error["loc"][2]: error["msg"] for error in answer["detail"]}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_the_form_does_not_allow_is_refused(server: Client, case: str) -> None:
    name, value, message = REFUSED[case][server.mode.noun]
    status, answer = server.post(server.mode.quick | {name: value})
    assert status == 422
    assert [error["type"] for error in answer["detail"]] == ["value_error"]
    assert said(answer)[name].startswith(message)


def test_all_that_is_wrong_is_said_at_once(server: Client) -> None:
    wrong = [REFUSED[case][server.mode.noun] for case in ("above the maximum", "no choice", "text for yes or no")]
    status, answer = server.post(server.mode.quick | {name: value for name, value, _ in wrong})
    assert (status, said(answer)) == (422, {name: message for name, _, message in wrong})


@pytest.mark.parametrize("body", [{"input": {}}, {"input": None}, {}], ids=["empty", "null", "none"])
def test_a_request_without_its_required_input_is_refused(server: Client, body: dict[str, Any]) -> None:
    missing = {"loc": ["body", "input", server.mode.required], "msg": "Field required", "type": "value_error.missing"}
    assert server.call("POST", f"/{server.mode.noun}", body) == (422, {"detail": [missing]})


def test_inputs_that_have_no_names_are_refused(server: Client) -> None:
    status, answer = server.post(["a dog"])
    assert (status, said(answer)) == (422, {"__root__": '["a dog"] is not of type "object"'})


def test_unknown_inputs_are_dropped(server: Client) -> None:
    """The request goes on to what is wrong with the known ones."""
    assert server.refusal(**server.mode.faulty, nonsense=1).startswith(server.mode.fault)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "parse"),
        (b"", {}, 400, "parse"),
        (b"[]", {}, 422, "deserialize"),
        (b'{"input": "', {}, 400, "parse"),
        (b"\xff", {}, 400, "parse"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (b'{"id": 1}', {}, 422, "deserialize"),
        (b'{"webhook_events_filter": ["done"]}', {}, 422, "unknown variant `done`"),
    ],
    ids=["cut", "empty", "list", "cut text", "no text", "type", "form", "id", "events"],
)
def test_what_is_no_request_is_refused(
    server: Client, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    seen, answer = server.call("POST", f"/{server.mode.noun}", body, headers)
    assert seen == status
    assert message in answer


def test_a_name_in_the_address_and_another_in_the_body_are_refused(server: Client) -> None:
    status, answer = server.put("one", server.mode.quick, id="two")
    assert (status, answer["detail"][0]["loc"]) == (422, ["body", "id"])


def test_what_was_refused_leaves_the_server_ready(server: Client) -> None:
    server.post({})
    assert server.health()["status"] == "READY"
