"""An HTTP server beside the tests: it hears webhooks, takes uploads, and gives files to whoever knows their address."""

import json
import threading
import time
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

ENDS = ("succeeded", "failed", "canceled")


@dataclass(frozen=True)
class Heard:
    """A request that sent something. path: with its query."""

    method: str
    path: str
    headers: Message
    body: bytes


class Hooks:
    """host: its name as the servers under test see it; any other than loopback's lets it listen on every interface.

    heard: all that was sent, in the order in which it came.   files: what is given, by path: what we put there, and
    what was uploaded.   refusing: answer uploads with a 500.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.heard: list[Heard] = []
        self.files: dict[str, tuple[str, bytes]] = {}
        self.refusing = False
        self._server = ThreadingHTTPServer(
            ("127.0.0.1" if host in ("127.0.0.1", "localhost") else "", port), _handler(self)
        )
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def give(self, name: str, content: bytes, mime: str = "application/octet-stream") -> str:
        """The address under which content may be had from now on."""
        self.files[f"/{name}"] = mime, content
        return f"{self.url}/{name}"

    def uploads(self, prediction: str) -> list[Heard]:
        """What was uploaded for a prediction, by its id."""
        return [one for one in self.heard if one.method == "PUT" and one.headers["X-Prediction-Id"] == prediction]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The bodies of the webhooks that came to the address /name."""
        return [json.loads(one.body) for one in self.heard if one.method == "POST" and one.path == f"/{name}"]

    def end(self, name: str) -> dict[str, Any]:
        """The webhook of an address that tells the end, once it has come. Others may come after it: Cog sends them side
        by side."""
        deadline = time.monotonic() + 60
        while not (found := [event for event in self.events(name) if event["status"] in ENDS]):
            assert time.monotonic() < deadline, "it was not heard within a minute"
            time.sleep(0.02)
        [event] = found
        return event


def _handler(hooks: Hooks) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.hear()
            self.answer(200)

        def do_PUT(self) -> None:
            heard = self.hear()
            if not hooks.refusing:
                hooks.files[self.path] = self.headers.get_content_type(), heard.body
            self.answer(500 if hooks.refusing else 200)

        def hear(self) -> Heard:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hooks.heard.append(Heard(self.command, self.path, self.headers, body))
            return hooks.heard[-1]

        def do_GET(self) -> None:
            mime, content = hooks.files.get(self.path, ("text/plain", None))
            self.answer(404 if content is None else 200, mime, content or b"")

        def answer(self, status: int, mime: str = "text/plain", content: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Type", mime)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
