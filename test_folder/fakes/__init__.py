"""Authorities on 127.0.0.1: small real HTTP servers, used as context managers, that remember what they were asked."""

import hashlib
import io
import re
import ssl
import tarfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, Self
from urllib.parse import parse_qsl, urlsplit

import pytest

from klora.errors import SourceError
from klora.sources.connection import Dialler
from klora.sources.deadline import Deadline, Patience
from klora.sources.download import Download
from klora.sources.fetch import fetch
from klora.sources.network import Network

CONTENT = (2).to_bytes(8, "little") + b"{}" + b" " * 600  # a .safetensors file by its first bytes


@dataclass(frozen=True)
class Request:
    """path: as sent, still encoded.  query: decoded."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Message

    @property
    def token(self) -> str | None:
        """What it carries for an Authorization."""
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Server:
    """url: without a slash at its end.  host: "127.0.0.1:port".  requests: in the order in which they came."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                request = Request(self.command, parts.path, dict(parse_qsl(parts.query)), self.headers)
                fake.requests.append(request)
                reply = fake.answer(request)
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                with suppress(ConnectionError):  # whoever asked wants no more of it
                    self.end_headers()
                    self.wfile.write(reply.body if self.command == "GET" else b"")

            do_HEAD = do_GET  # noqa: N815, the name that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def tokens(self) -> set[str]:
        """Every token that it was shown."""
        return {request.token for request in self.requests if request.token}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


SIGNATURE = "X-Amz-Signature"


class Storage(Server):
    """Where authorities keep their files, for whoever has a signed address and shows no token besides.

    files: by path, "/a/b".
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}

    def signed(self, path: str, content: bytes) -> str:
        """The address under which content may be had from now on."""
        self.files[path] = content
        return f"{self.url}{path}?{SIGNATURE}={self._signature(path)}"

    def answer(self, request: Request) -> Reply:
        if request.token is not None:
            return Reply(400, b"<Error><Code>InvalidArgument</Code></Error>")
        if request.query.get(SIGNATURE) != self._signature(request.path):
            return Reply(403, b"<Error><Code>AccessDenied</Code></Error>")
        return ranged(request, self.files[request.path]) if request.path in self.files else Reply(404)

    def _signature(self, path: str) -> str:
        return hashlib.sha256(f"{self.host}{path}".encode()).hexdigest()


def ranged(request: Request, content: bytes, headers: Mapping[str, str] | None = None) -> Reply:
    """Content, or the part of it that is asked for."""
    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes", **(headers or {})}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["Range"] or "")
    if asked is None:
        return Reply(200, content, headers)
    first, last = int(asked[1]), int(asked[2] or len(content) - 1)
    return Reply(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})


def tarred(files: Mapping[str, bytes]) -> bytes:
    """A plain tar of files by their path."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


QUICK = Patience(connect=20.0, pause=0.01)
_CONTEXT = ssl.create_default_context()  # one for all: it takes longer to make than most tests


class Addressed(Protocol):
    """A server of either kind."""

    @property
    def host(self) -> str:
        """As a URL has it, with its port."""


def network(*servers: Addressed, **dialler: Any) -> Network:
    """A way to these servers and to no other of this machine, that does not wait long before it tries again.

    dialler: what of its Dialler is otherwise.
    """
    usual = {"patience": QUICK, "context": _CONTEXT}
    return Network(frozenset(server.host for server in servers), Dialler(**{**usual, **dialler}))


def fetched(download: Download, net: Network) -> bytes:
    """What a download brings. Raises SourceError."""
    memory = Memory()
    with Deadline(20) as deadline:
        fetch(download, memory, net, deadline, 1 << 20)
    return memory.data


class Memory:
    """A sink that says what was done with it."""

    def __init__(self) -> None:
        self.data = b""
        self.restarts = 0

    def write(self, data: bytes) -> None:
        self.data += data

    def restart(self) -> None:
        self.data = b""
        self.restarts += 1


def refused(resolve: Callable[..., object], kind: type[SourceError], text: str, token: object = None) -> str:
    """The one sentence with which a reference is refused, as just this kind of error, without a token or a chain."""
    with pytest.raises(kind) as error:
        resolve(text, token)
    assert type(error.value) is kind
    assert error.value.__suppress_context__ or not error.value.__context__
    assert "Canary" not in str(error.value) and " Expected " in str(error.value)
    return str(error.value)
