"""A Cog server: its form, and one prediction or training from its inputs to its end.

Cog tells how far a running request is only to whoever puts it again under its name, which starts another when it has
ended. A body that no form accepts is answered alike while it runs, and starts nothing.
"""

import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

from playground.connection import Connection, Patience, Run, taken
from playground.errors import PlaygroundError

POLL_SECONDS = 0.25
BUSY_SECONDS = 0.5
NO_FORM_ACCEPTS = {"input": "how far?"}


class CogServer:
    """A server in predict mode, or in train mode. noun: predictions or trainings."""

    def __init__(self, connection: Connection, noun: str = "predictions") -> None:
        self.connection, self._noun = connection, noun
        self._component = "Input" if noun == "predictions" else "TrainingInput"

    def schemas(self) -> tuple[Mapping[str, Any], str]:
        """(the schemas of its OpenAPI document, the name of the form's among them). Raises PlaygroundError."""
        return self.connection.get("/openapi.json").get("components", {}).get("schemas", {}), self._component

    def run(self, inputs: Mapping[str, Any], stop: threading.Event) -> Iterator[Run]:
        """How a request stands, several times a second until it has ended. Raises PlaygroundError.

        stop: set by another thread to cancel it. It is also cancelled when the iterator is closed.  While the server
        is busy with another's request, this one waits.
        """
        while True:
            name = uuid.uuid4().hex
            asked = self._ask(name, inputs)
            try:
                yield from self._live(name, asked, stop)
            finally:
                if not asked.done():
                    self._cancel(name)
            status, answer = asked.result()
            if status != 409:
                break
            self._check_alive()
            yield Run("waiting")
            if stop.wait(BUSY_SECONDS):
                yield Run("canceled")
                return
        yield Run.told_by(taken(status, answer))

    def _ask(self, name: str, inputs: Mapping[str, Any]) -> "Future[tuple[int, Any]]":
        """The answer to come. A thread that is no pool's, for those keep a program from ending."""
        answer: Future[tuple[int, Any]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self.connection.call("PUT", self._address(name), {"input": dict(inputs)}, None))
            except PlaygroundError as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        return answer

    def _live(self, name: str, asked: "Future[tuple[int, Any]]", stop: threading.Event) -> Iterator[Run]:
        last, patience = Run("starting"), Patience()  # if the server is gone, what was asked fails by itself
        while not wait([asked], POLL_SECONDS).done:
            last = patience.answer(lambda: self._polled(name, stop)) or last
            if not last.ended:
                yield last

    def _polled(self, name: str, stop: threading.Event) -> Run | None:
        """How far it is, where the server says so. Raises PlaygroundError."""
        if stop.is_set():
            self._cancel(name)  # again each time: the request may not have begun when it first was
        status, answer = self.connection.call("PUT", self._address(name), NO_FORM_ACCEPTS)
        return Run.told_by(taken(status, answer)) if status == 202 else None

    def _cancel(self, name: str) -> None:
        self.connection.call("POST", f"{self._address(name)}/cancel")

    def _check_alive(self) -> None:
        """Raises PlaygroundError where busy means for ever: Cog answers so when its worker has died."""
        status = self.connection.get("/health-check").get("status")
        if status not in ("READY", "BUSY"):
            raise PlaygroundError(f"The server is {status}. Expected READY: start it again, and see its log.")

    def _address(self, name: str) -> str:
        return f"/{self._noun}/{name}"
