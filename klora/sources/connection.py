"""One request over one connection: to an address that was checked, and to no other.

The standard http.client: it logs nothing (urllib3 logs paths with their queries), keeps no cookies, reads no .netrc and
no proxy settings, follows nothing, and sends over the socket that it is given. Knows nothing of redirects and retries.
"""

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import certifi

from klora.errors import SourceError
from klora.sources.addresses import Target, is_public
from klora.sources.answer import Answer, guarded
from klora.sources.deadline import Deadline, Patience
from klora.sources.download import Unreachable

MAX_HEADER_BYTES = 64 << 10  # http.client itself takes at most 100 headers, of 64 KiB each
MAX_ADDRESSES = 4  # of a host, that are tried

Info = tuple[int, int, int, str, Any]  # as socket.getaddrinfo has it


def trusting(authorities: Path | str) -> ssl.SSLContext:
    """TLS with hosts whom the authorities of this file vouch for, whatever others the environment may name."""
    context = ssl.create_default_context(cafile=authorities)
    # Whoever sits in between could end a body early, which some builds of Python would have OpenSSL forgive.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


@dataclass(frozen=True)
class Dialler:
    """How connections are made. resolve: as socket.getaddrinfo; connect: joins a socket to an address, once checked."""

    patience: Patience = Patience()
    resolve: Callable[..., Sequence[Info]] = socket.getaddrinfo
    connect: Callable[[socket.socket, Any], None] = socket.socket.connect
    context: ssl.SSLContext = field(default_factory=lambda: trusting(certifi.where()))

    @contextmanager
    def answer(self, target: Target, headers: Mapping[str, str], deadline: Deadline) -> Iterator[Answer]:
        """GET target over a connection of its own. Raises SourceError and what is below it."""
        with ExitStack() as stack:
            yield guarded(lambda: self._request(target, headers, deadline, stack), target.who, deadline)

    def _request(self, target: Target, headers: Mapping[str, str], deadline: Deadline, stack: ExitStack) -> Answer:
        connection = _Connection(target.host, target.port)
        connection.sock = self._connected(target, deadline, stack)
        fixed = {"Host": target.authority, "Accept-Encoding": "identity", "Connection": "close"}
        others = {name: value for name, value in headers.items() if name.title() not in fixed}
        connection.request("GET", target.path, headers=fixed | others)
        response = connection.getresponse()
        stack.callback(response.close)
        return Answer(response, target, deadline)

    def _connected(self, target: Target, deadline: Deadline, stack: ExitStack) -> socket.socket:
        """A socket to the first of the target's addresses that takes a connection, watched until the stack unwinds."""
        failure = OSError()
        for family, kind, protocol, _, address in self._addresses(target, deadline):
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.settimeout(min(self.patience.connect, deadline.left()))
            try:
                with deadline.watch(sock):
                    self.connect(sock, address)
            except OSError as error:
                failure = error
                continue
            if target.scheme == "https":
                sock = self._encrypted(sock, target.host, deadline, stack)
            sock.settimeout(self.patience.read)
            stack.enter_context(deadline.watch(sock))
            return sock
        raise failure

    def _encrypted(self, sock: socket.socket, host: str, deadline: Deadline, stack: ExitStack) -> ssl.SSLSocket:
        # The handshake apart, so that it is watched; an end without a farewell is a break, not the end of a body.
        encrypted = self.context.wrap_socket(
            sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        stack.enter_context(encrypted)
        with deadline.watch(encrypted):
            encrypted.do_handshake()
        return encrypted

    def _addresses(self, target: Target, deadline: Deadline) -> Sequence[Info]:
        """The target's addresses, every one of them public, unless the operator trusts it. Raises SourceError."""
        addresses = self._resolved(target, deadline)
        # The same sentence where the name does not exist: or it would tell which names there are in a private network.
        sentence = f"{target.who} has no public address. Expected a host on the public internet."
        if not addresses:
            raise Unreachable(sentence)
        if not target.trusted and not all(is_public(str(info[4][0])) for info in addresses):
            raise SourceError(sentence)
        return addresses[:MAX_ADDRESSES]

    def _resolved(self, target: Target, deadline: Deadline) -> Sequence[Info]:
        """The resolver's answer, [] without one in time. It is asked in a thread, for nothing can interrupt its
        wait."""
        answers: queue.SimpleQueue[Sequence[Info] | None] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self.resolve(target.host, target.port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError):
                answers.put([])

        threading.Thread(target=ask, daemon=True).start()
        with deadline.interrupting(lambda: answers.put(None)):
            try:
                addresses = answers.get(timeout=self.patience.connect)
            except queue.Empty:
                addresses = []
        deadline.left()
        return addresses or []


class _Lines:
    """A response's file while its headers are read. left: bytes that these may still have."""

    def __init__(self, file: BufferedReader, left: int) -> None:
        self._file = file
        self._left = left
        self.close = file.close

    def readline(self, size: int) -> bytes:
        line = self._file.readline(size)
        if not line:  # http.client takes it for the end of the headers
            raise ConnectionResetError
        self._left -= len(line)
        if self._left < 0:
            raise HTTPException("long headers")
        return line


class _Response(HTTPResponse):
    def begin(self) -> None:
        file = self.fp
        self.fp = cast(BufferedReader, _Lines(file, MAX_HEADER_BYTES))
        try:
            super().begin()
        finally:
            if self.fp is not None:  # None: closed, since what came is no HTTP
                self.fp = file


class _Connection(HTTPConnection):
    response_class = _Response
    auto_open = 0  # never a connection of its own making
