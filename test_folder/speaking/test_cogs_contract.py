"""How the playground runs predictions on Cog, where the real server of the browser tests is hard to bring to it."""

import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from klora.form.inputs import progress_line
from playground.cog import CogServer
from playground.connection import Connection, Run
from playground.errors import PlaygroundError
from playground.progress import Server
from playground.replicate import ReplicateModel
from test_folder.speaking.answering import ANSWERED, Answer, answering, last


def test_a_busy_server_is_waited_for_and_asked_anew() -> None:
    puts = iter([(409, {"error": "At capacity"}), (200, ANSWERED)])

    def answer(method: str, path: str, body: Any) -> Answer:
        if path == "/health-check":
            return 200, {"status": "BUSY"}
        return next(puts) if isinstance(body["input"], dict) else (422, {"detail": []})

    with answering(answer) as server:
        runs = list(CogServer(Connection(server.url)).run({"prompt": "x"}, threading.Event()))
    assert [run.status for run in runs if run.status != "starting"] == ["waiting", "succeeded"]
    assert runs[-1].output == ANSWERED["output"]
    assert len(set(server.paths("PUT"))) == 2, "each asking has a name of its own"


def test_one_that_waits_can_be_cancelled() -> None:
    def answer(method: str, path: str, body: Any) -> Answer:
        return (200, {"status": "BUSY"}) if path == "/health-check" else (409, {"error": "At capacity"})

    stop = threading.Event()
    with answering(answer) as server:
        runs = CogServer(Connection(server.url)).run({}, stop)
        assert next(run for run in runs if run.status == "waiting")
        stop.set()
        assert last(runs).status == "canceled"


def test_a_server_whose_worker_has_died_is_not_waited_for() -> None:
    def answer(method: str, path: str, body: Any) -> Answer:
        return (200, {"status": "UNHEALTHY"}) if path == "/health-check" else (409, {"error": "At capacity"})

    with answering(answer) as server, pytest.raises(PlaygroundError, match=r"UNHEALTHY\. Expected READY"):
        list(islice(CogServer(Connection(server.url)).run({}, threading.Event()), 6))


def test_whoever_stops_listening_cancels() -> None:
    ended = threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        if method == "POST":
            ended.set()
            return 200, {}
        if not isinstance(body["input"], dict):
            return 202, {"status": "processing", "logs": progress_line(3, 20)}
        ended.wait(30)
        return 200, {"status": "canceled"}

    with answering(answer) as server:
        runs = CogServer(Connection(server.url)).run({}, threading.Event())
        assert next(runs).step == (3, 20, "")
        runs.close()
    [name] = {path.removesuffix("/cancel") for path in server.paths("PUT") + server.paths("POST")}
    assert server.paths("POST") == [f"{name}/cancel"]


def test_what_is_refused_is_said_input_by_input() -> None:
    faults = [
        {"loc": ["body", "input", "seed"], "msg": '"a" is not of type "integer"', "type": "value_error"},
        {"loc": ["body", "input", "prompt"], "msg": "Field required", "type": "value_error.missing"},
    ]
    with answering(lambda *_: (422, {"detail": faults})) as server, pytest.raises(PlaygroundError) as refused:
        last(CogServer(Connection(server.url)).run({}, threading.Event()))
    assert str(refused.value) == 'seed: "a" is not of type "integer". prompt: Field required.'


@pytest.mark.parametrize(
    ("status", "said", "sentence"),
    [
        (200, b"<html>Sign in", "The server answers 200: <html>Sign in"),
        (200, [], "The server answers 200: []"),
        (500, None, "The server answers 500: None"),
        (403, {"detail": [{"msg": "no"}]}, "The server answers 403: [{'msg': 'no'}]"),
        (429, {"title": "Slow down", "detail": []}, "The server answers 429: Slow down"),
    ],
    ids=["page", "list", "null", "no place", "title"],
)
@pytest.mark.parametrize("server_of", [CogServer, ReplicateModel])
def test_what_a_gateway_answers_in_the_servers_place_is_said(
    server_of: Callable[[Connection], Server], status: int, said: Any, sentence: str
) -> None:
    def answer(method: str, path: str, body: Any) -> Answer:
        return (200, {"latest_version": {"id": "v2"}}) if method == "GET" else (status, said)

    with answering(answer) as fake, pytest.raises(PlaygroundError) as refused:
        last(server_of(Connection(fake.url)).run({}, threading.Event()))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("Prediction failed: Prediction failed: RequestError: prompt is empty.", "prompt is empty."),
        ("Prediction failed: Training failed: UploadError: No picture.", "No picture."),
        ("Worker crashed", "Worker crashed"),
        ("Prediction failed: Input validation error: 404", "Input validation error: 404"),
    ],
)
def test_the_servers_sentence_is_shown_alone(error: str, sentence: str) -> None:
    assert Run.told_by({"status": "failed", "error": error}).error == sentence


def test_progress_is_what_the_log_says_last() -> None:
    logs = f"seed 7\n{progress_line(0, 20)}\n{progress_line(3, 20, 'loss 0.5')}\nmore\n"
    assert Run("processing", logs).step == (3, 20, "loss 0.5")
    assert Run("processing", "seed 7\n100% sure\n").step is None
