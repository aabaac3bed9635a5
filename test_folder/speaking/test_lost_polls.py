"""What becomes of a request when the server does not answer how it stands, for once or for good."""

import threading
from typing import Any

import pytest

from klora.form.inputs import progress_line
from playground import connection
from playground.cog import CogServer
from playground.connection import Connection
from playground.errors import PlaygroundError
from playground.replicate import ReplicateModel
from test_folder.speaking.answering import ANSWERED, Answer, answering, last


def dropped(method: str, path: str, body: Any) -> Answer:
    """The connection breaks off without an answer."""
    raise ConnectionAbortedError


def test_a_training_outlives_a_poll_that_is_dropped() -> None:
    polls, enough = iter(range(1, 100)), threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        if isinstance(body and body["input"], dict):
            assert enough.wait(30)
            return 200, ANSWERED
        if method == "PUT" and (number := next(polls)) == 3:
            dropped(method, path, body)
        if method == "PUT" and number == 5:
            enough.set()
        return 202, {"status": "processing", "logs": progress_line(number, 20)}

    with answering(answer) as server:
        runs = list(CogServer(Connection(server.url), "trainings").run({"steps": 20}, threading.Event()))
    assert runs[-1].status == "succeeded"
    assert [run.step[0] for run in runs if run.step][:5] == [1, 2, 2, 4, 5], "what was told before stands meanwhile"
    assert server.paths("POST") == [], "nothing was cancelled"


def test_a_cancellation_that_is_dropped_is_sent_again() -> None:
    stop, cancels, ended = threading.Event(), iter(range(1, 100)), threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        if isinstance(body and body["input"], dict):
            assert ended.wait(30)
            return 200, {"status": "canceled"}
        if method == "POST" and next(cancels) == 1:
            dropped(method, path, body)
        if method == "POST":
            ended.set()
        return 202, {"status": "processing"}

    with answering(answer) as server:
        runs = CogServer(Connection(server.url)).run({}, stop)
        next(runs)
        stop.set()
        assert last(runs).status == "canceled"


def test_a_server_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.5)
    gone = threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        if isinstance(body and body["input"], dict):
            gone.wait(30)
        return dropped(method, path, body)

    with answering(answer) as server:
        with pytest.raises(PlaygroundError, match=r"does not answer: ConnectionError\.$"):
            last(CogServer(Connection(server.url)).run({}, threading.Event()))
        gone.set()


def test_where_the_request_itself_breaks_off_it_has_failed() -> None:
    with answering(dropped) as server, pytest.raises(PlaygroundError, match=r"does not answer: ConnectionError\.$"):
        last(CogServer(Connection(server.url)).run({}, threading.Event()))
    assert server.paths("POST") == []


def test_an_answer_that_breaks_off_is_none() -> None:
    broken = (200, b'{"status": ', {"Content-Type": "application/json"})
    with (
        answering(lambda *_: broken) as server,
        pytest.raises(PlaygroundError, match=r"does not answer: JSONDecodeError"),
    ):
        Connection(server.url).get("/openapi.json")


def test_a_prediction_on_replicate_outlives_a_poll_that_is_dropped() -> None:
    states = iter(["processing", "", "succeeded"])

    def answer(method: str, path: str, body: Any) -> Answer:
        if path.endswith("/klora"):
            return 200, {"latest_version": {"id": "v2"}}
        urls = {"get": f"{server.url}/v1/predictions/1", "cancel": f"{server.url}/v1/predictions/1/cancel"}
        if method == "POST":
            return 201, {"status": "starting", "urls": urls}
        return (200, ANSWERED | {"status": state}) if (state := next(states)) else dropped(method, path, body)

    with answering(lambda *asked: answer(*asked)) as server:
        runs = list(ReplicateModel(Connection(f"{server.url}/v1/models/me/klora")).run({}, threading.Event()))
    assert [run.status for run in runs] == ["starting", "processing", "processing", "succeeded"]
    assert server.paths("POST") == ["/v1/predictions"]
