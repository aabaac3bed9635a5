"""How the playground runs predictions through Replicate's API."""

import threading
from typing import Any

from playground.connection import Connection
from playground.form import read_form
from playground.replicate import ReplicateModel
from test_folder.speaking.answering import ANSWERED, SCHEMAS, Answer, answering, last


def test_a_model_of_replicates_api_is_asked_for_its_latest_version() -> None:
    states = iter(["processing", "succeeded"])

    def answer(method: str, path: str, body: Any) -> Answer:
        if path == "/v1/models/me/klora":
            return 200, {"latest_version": {"id": "v2", "openapi_schema": {"components": {"schemas": SCHEMAS}}}}
        urls = {"get": f"{server.url}/v1/predictions/1", "cancel": f"{server.url}/v1/predictions/1/cancel"}
        if method == "POST":
            return 201, {"status": "starting", "urls": urls}
        return 200, ANSWERED | {"status": next(states)}

    with answering(lambda *asked: answer(*asked)) as server:
        model = ReplicateModel(Connection(f"{server.url}/v1/models/me/klora", "s3cret"))
        assert read_form(*model.schemas())[0].name == "prompt"
        run = last(model.run({"prompt": "x"}, threading.Event()))
    assert run.output == ANSWERED["output"]
    posted = [(path, body) for method, path, body, _ in server.asked if method == "POST"]
    assert posted == [("/v1/predictions", {"version": "v2", "input": {"prompt": "x"}})]
    assert {token for *_, token in server.asked} == {"Bearer s3cret"}


def test_a_prediction_on_replicate_is_cancelled() -> None:
    stop, cancelled = threading.Event(), threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        urls = {"get": f"{server.url}/v1/predictions/1", "cancel": f"{server.url}/v1/predictions/1/cancel"}
        if path.endswith("/cancel"):
            cancelled.set()
        state = "canceled" if cancelled.is_set() else "processing"
        known = {"latest_version": {"id": "v2"}}
        return (200, known) if path.endswith("/klora") else (200, {"status": state, "urls": urls})

    with answering(lambda *asked: answer(*asked)) as server:
        runs = ReplicateModel(Connection(f"{server.url}/v1/models/me/klora")).run({}, stop)
        assert next(runs).status == "processing"
        stop.set()
        assert last(runs).status == "canceled"
