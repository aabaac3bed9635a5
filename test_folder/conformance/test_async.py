"""Requests that nobody waits for, webhooks, and cancellation: afterwards the server is as it was."""

import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from test_folder.conformance.client import Client, progress
from test_folder.conformance.hooks import Hooks
from test_folder.conformance.payloads import content_of

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def drawn(predictor: Client) -> np.ndarray:
    """What a quick request gives before the test."""
    return predictor.images(**predictor.mode.quick)[0]


def is_as_before(predictor: Client, drawn: np.ndarray) -> bool:
    predictor.wait_until_ready()
    return np.array_equal(predictor.images(**predictor.mode.quick)[0], drawn)


# Webhooks.


def test_an_answer_comes_at_once_and_the_rest_by_webhook(predictor: Client, hooks: Hooks) -> None:
    status, answer = predictor.put("told", predictor.mode.quick, ASYNC, webhook=f"{hooks.url}/told")
    assert (status, answer) == (202, {"id": "told", "status": "starting"})
    end = hooks.end("told")
    assert (end["id"], end["status"], end["metrics"]["seed"]) == ("told", "succeeded", 7)
    assert progress(end["logs"]) == [(0, 0, 2), (50, 1, 2), (100, 2, 2)]
    assert content_of(end["output"][0])[0] == "image/png"
    assert {event["status"] for event in hooks.events("told")} == {"processing", "succeeded"}


def test_webhooks_tell_each_image_as_it_is_there(predictor: Client, hooks: Hooks) -> None:
    predictor.post(predictor.mode.quick | {"num_outputs": 3}, ASYNC, webhook=f"{hooks.url}/images")
    assert len(hooks.end("images")["output"]) == 3
    predictor.wait_for(lambda: {1, 2, 3} <= {len(event.get("output") or ()) for event in hooks.events("images")})


def test_webhooks_tell_how_far_it_is(predictor: Client, hooks: Hooks) -> None:
    predictor.begin("far", webhook=f"{hooks.url}/far", webhook_events_filter=["logs"])
    predictor.wait_for(lambda: any(progress(event["logs"]) for event in hooks.events("far")))
    assert predictor.cancel("far") == 200
    assert {event["status"] for event in hooks.events("far")} == {"processing"}


@pytest.mark.parametrize(
    ("events", "statuses"),
    [
        (["completed"], ["succeeded"]),
        (["start"], ["processing"]),
        (["start", "completed"], ["processing", "succeeded"]),
    ],
    ids=" and ".join,
)
def test_webhooks_come_for_what_was_asked_for(
    predictor: Client, hooks: Hooks, events: list[str], statuses: list[str]
) -> None:
    name = f"only-{'-'.join(events)}"
    asked = {"webhook": f"{hooks.url}/{name}", "webhook_events_filter": events}
    predictor.put(name, predictor.mode.quick, **asked)
    predictor.wait_for(lambda: len(hooks.events(name)) >= len(statuses))
    assert sorted(event["status"] for event in hooks.events(name)) == statuses


def test_a_webhook_tells_why_a_request_failed(server: Client, hooks: Hooks) -> None:
    name = f"failed-{server.mode.noun}"
    assert server.put(name, server.mode.faulty, ASYNC, webhook=f"{hooks.url}/{name}")[0] == 202
    end = hooks.end(name)
    assert end["status"] == "failed"
    assert server.mode.fault in end["error"]


def test_webhooks_that_nobody_hears_harm_nothing(predictor: Client, drawn: np.ndarray) -> None:
    status, answer = predictor.post(predictor.mode.quick, webhook="http://127.0.0.1:9/nobody")
    assert (status, answer["status"]) == (200, "succeeded")
    assert is_as_before(predictor, drawn)


# A server that is busy.


def test_while_it_works_it_says_so_and_takes_nothing_else(predictor: Client) -> None:
    predictor.begin("busy")
    refused = predictor.call("POST", "/predictions", {"input": predictor.mode.quick}, patient=False)
    busy = predictor.health()["status"]
    same = predictor.put("busy", predictor.mode.slow)
    predictor.cancel("busy")
    assert refused == (409, {"error": "At capacity - all prediction slots busy", "status": "failed"})
    assert busy == "BUSY"
    assert (same[0], same[1]["id"], same[1]["status"]) == (202, "busy", "processing")
    assert progress(same[1]["logs"])


# Cancellation.


def test_who_waits_is_told_of_the_cancellation(predictor: Client, drawn: np.ndarray) -> None:
    answers: list[tuple[int, Any]] = []
    slow = predictor.mode.slow
    predictor.wait_until_ready()
    client = threading.Thread(target=lambda: answers.append(predictor.put("waiting", slow)))
    client.start()
    predictor.wait_for_steps("waiting")
    assert predictor.cancel("waiting") == 200
    client.join(60)
    [(status, answer)] = answers
    assert (status, answer["status"]) == (200, "canceled")
    assert "output" not in answer or not answer["output"]
    assert is_as_before(predictor, drawn)


def test_a_cancellation_comes_by_webhook(predictor: Client, hooks: Hooks, drawn: np.ndarray) -> None:
    predictor.begin("cancelled", webhook=f"{hooks.url}/cancelled", webhook_events_filter=["completed"])
    assert predictor.cancel("cancelled") == 200
    assert hooks.end("cancelled")["status"] == "canceled"
    assert is_as_before(predictor, drawn)


def test_who_goes_away_cancels(predictor: Client, hooks: Hooks, drawn: np.ndarray) -> None:
    place = urlsplit(predictor.url)
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = kind(place.netloc, timeout=60)
    asked = {"input": predictor.mode.slow, "webhook": f"{hooks.url}/gone", "webhook_events_filter": ["completed"]}
    predictor.wait_until_ready()
    connection.request("PUT", "/predictions/gone", json.dumps(asked), {"Content-Type": "application/json"})
    predictor.wait_for_steps("gone")
    connection.close()
    assert hooks.end("gone")["status"] == "canceled"
    assert is_as_before(predictor, drawn)


def test_who_went_away_without_waiting_cancels_nothing(predictor: Client, hooks: Hooks) -> None:
    """Its connection ends with the answer 202, and the work goes on."""
    predictor.put("alone", predictor.mode.quick | {"num_inference_steps": 20}, ASYNC, webhook=f"{hooks.url}/alone")
    assert hooks.end("alone")["status"] == "succeeded"


def test_what_is_over_cannot_be_cancelled(predictor: Client) -> None:
    predictor.put("over", predictor.mode.quick)
    predictor.wait_until_ready()
    assert predictor.cancel("over") == 404


def test_after_many_cancellations_it_draws_as_before(predictor: Client, drawn: np.ndarray) -> None:
    """Wherever they strike: at once, and after some steps."""
    for number in range(3):
        predictor.begin(f"many-{number}")
        predictor.cancel(f"many-{number}")
        assert predictor.put(f"early-{number}", predictor.mode.slow, ASYNC)[0] == 202
        predictor.cancel(f"early-{number}")
        predictor.wait_until_ready()
    assert is_as_before(predictor, drawn)
