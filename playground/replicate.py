"""A model on Replicate, or behind an API like Replicate's: its form, and one prediction of its latest version."""

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from playground.connection import Connection, Patience, Run, taken
from playground.errors import PlaygroundError

POLL_SECONDS = 1.0


class ReplicateModel:
    """A model's page of the API, as https://api.replicate.com/v1/models/OWNER/NAME."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._predictions = f"{connection.url.rpartition('/models/')[0]}/predictions"

    def schemas(self) -> tuple[Mapping[str, Any], str]:
        """(the schemas of the latest version's OpenAPI document, the form's name in it). Raises PlaygroundError."""
        return self._latest()["openapi_schema"]["components"]["schemas"], "Input"

    def run(self, inputs: Mapping[str, Any], stop: threading.Event) -> Iterator[Run]:
        """How a request stands, about once a second until it has ended. Raises PlaygroundError.

        stop: set by another thread to cancel it. It is also cancelled when the iterator is closed.
        """
        body = {"version": self._latest()["id"], "input": dict(inputs)}
        answer = taken(*self.connection.call("POST", self._predictions, body))
        urls, state, patience = answer["urls"], Run.told_by(answer), Patience()
        try:
            while not state.ended:
                yield state
                if stop.wait(POLL_SECONDS):
                    patience.answer(lambda: self.connection.call("POST", urls["cancel"]))
                    time.sleep(POLL_SECONDS)
                state = patience.answer(lambda: Run.told_by(self.connection.get(urls["get"]))) or state
        finally:
            if not state.ended:
                self.connection.call("POST", urls["cancel"])
        yield state

    def _latest(self) -> Mapping[str, Any]:
        version: Mapping[str, Any] | None = self.connection.get("").get("latest_version")
        if not version:
            raise PlaygroundError("The model has no version yet. Expected one that was pushed.")
        return version
