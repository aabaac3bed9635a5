"""A server on loopback that misbehaves on demand: what it sends is written down to the byte, and so is when.

A behaviour is a function of the Client: it sends what it likes. Behaviours are made by the functions below.
"""

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.parser import Parser
from types import TracebackType
from typing import Self


@dataclass
class Client:
    """One connection, its request read. number: of the requests for this path, from 0."""

    sock: socket.socket
    path: str
    headers: Message
    number: int
    stopped: threading.Event

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than the server is there."""
        if self.stopped.wait(seconds):
            raise ConnectionAbortedError

    def reset(self) -> None:
        """End the connection with RST in place of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Behaviour = Callable[[Client], None]


@dataclass
class Hostile:
    """The server, while a with block runs. routes: {path without its query: behaviour}; it notes what it was asked."""

    routes: Mapping[str, Behaviour] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    requests: list[Client] = field(default_factory=list)
    connections: int = 0

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def asked(self, path: str) -> list[Client]:
        """The requests for a path, in order."""
        return [client for client in self.requests if client.path.partition("?")[0] == path]

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as lines:
                first = lines.readline().decode("latin-1")
                rest = "".join(iter(lambda: lines.readline().decode("latin-1").rstrip("\r\n") + "\n", "\n"))
                path = first.split(" ")[1]
                route = path.partition("?")[0]
                client = Client(sock, path, Parser().parsestr(rest), len(self.asked(route)), self._stopped)
                self.requests.append(client)
                self.routes.get(route, reply(b"", status=404))(client)
        except (OSError, IndexError):  # the client went away, or said nothing: both are among the tests
            sock.close()


def head(status: int = 200, *headers: str) -> bytes:
    """A status line and headers, each spelled in full."""
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} As Asked", *headers, "")).encode("latin-1")


def reply(body: bytes = b"", *headers: str, status: int = 200) -> Behaviour:
    """What a good server would say."""
    return says(head(status, f"Content-Length: {len(body)}", *headers) + body)


def says(*parts: bytes | float) -> Behaviour:
    """These bytes; a number is a pause, in seconds."""

    def behave(client: Client) -> None:
        for part in parts:
            client.send(part) if isinstance(part, bytes) else client.pause(part)

    return behave


def resets(data: bytes) -> Behaviour:
    """These bytes, then RST."""

    def behave(client: Client) -> None:
        client.send(data)
        client.pause(0.05)  # a reset at once would take back what was sent
        client.reset()

    return behave


def drips(start: bytes, drop: bytes, pause: float) -> Behaviour:
    """start, then drop after drop, a pause between them, for ever."""

    def behave(client: Client) -> None:
        client.send(start)
        while True:
            client.send(drop)
            client.pause(pause)

    return behave


def floods(start: bytes, drop: bytes) -> Behaviour:
    """start, then drop after drop as fast as they are taken."""
    return drips(start, drop * (1 + 65536 // len(drop)), 0)


def hangs(client: Client) -> None:
    """Nothing, until the server stops."""
    client.pause(3600)


def redirects(location: str, status: int = 302) -> Behaviour:
    return reply(b"", f"Location: {location}", status=status)


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """The first for the first request, and so on; the last for all that follow."""
    return lambda client: behaviours[min(client.number, len(behaviours) - 1)](client)


@dataclass
class Ranged:
    """A file that can be resumed; the connections of cuts break off after so many bytes of the file.

    obeys: whether Range and If-Range are; claimed: what Content-Range says instead of the truth.
    """

    body: bytes
    cuts: tuple[int, ...] = ()
    etag: str | None = '"1"'
    obeys: bool = True
    claimed: str | None = None

    def __call__(self, client: Client) -> None:
        asked = client.headers["Range"]
        same = client.headers["If-Range"] in (None, self.etag)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and same and self.obeys else 0
        end = self.cuts[client.number] if client.number < len(self.cuts) else len(self.body)
        lines = [f"Content-Length: {len(self.body) - start}"] + ([f"ETag: {self.etag}"] if self.etag else [])
        if asked and same and self.obeys:
            lines.append("Content-Range: " + (self.claimed or f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"))
        client.send(head(206 if len(lines) > 1 and lines[-1].startswith("Content-Range") else 200, *lines))
        client.send(self.body[start:end])
