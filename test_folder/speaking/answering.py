"""A server on loopback that answers as told, where the real one is hard to bring to it."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playground.connection import Run

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "openapi_schema.json"
SCHEMAS = json.loads(GOLDEN.read_text())["components"]["schemas"]
ANSWERED = {"status": "succeeded", "output": ["data:image/png;base64,AAAA"], "metrics": {"seed": 7}}
Answer = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]


@dataclass
class Fake:
    """A server on loopback that answers as told. asked: (method, path, body, token) in the order in which they came."""

    url: str
    asked: list[tuple[str, str, Any, str | None]] = field(default_factory=list)

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _, _ in self.asked if how == method]


@contextmanager
def answering(answer: Callable[[str, str, Any], Answer]) -> Iterator[Fake]:
    """A fake server. answer: (method, path, body) -> (status, JSON or bytes, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.asked.append((self.command, self.path, body, self.headers["Authorization"]))
            status, said, *headers = answer(self.command, self.path, body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            kind = "application/octet-stream" if isinstance(said, bytes) else "application/json"
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **dict(*headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_one  # noqa: N815, the names that http.server calls

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = Fake(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def last(runs: Iterator[Run]) -> Run:
    return list(runs)[-1]
