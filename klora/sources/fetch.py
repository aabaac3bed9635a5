"""A Download -> its bytes in a Sink: counted, compared with what the authority said, begun again where it broke off.

Knows nothing of where the bytes are kept.
"""

import hashlib
import logging
import re
import time
from typing import Protocol
from urllib.parse import urlsplit

from klora.errors import SourceError
from klora.sources.answer import Answer
from klora.sources.deadline import Deadline, Patience
from klora.sources.download import Denied, Download, Unreachable
from klora.sources.formats import EXPECTED, HEAD_BYTES, WEB_PAGE, unlike_json, unlike_lora
from klora.sources.network import Network
from klora.sources.retries import persistently

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20  # at most, at a time

_LOGIN = re.compile(r"/(?:log[-_]?in|sign[-_]?in|sign[-_]?up|auth|join)\b", re.IGNORECASE)
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


class Sink(Protocol):
    """Where bytes go, in order."""

    def write(self, data: bytes) -> object:
        """Take the next bytes, all of them."""

    def restart(self) -> None:
        """Forget all that was written."""


def fetch(download: Download, sink: Sink, net: Network, deadline: Deadline, max_bytes: int) -> str:
    """Write the file that download names into sink. Returns its sha256, in hex.

    Raises SourceError where it is not what the authority said, above max_bytes or no LoRA by its first bytes, NotFound,
    Denied or Unreachable as the server answers, the last after retries. What sink then holds is of no use.
    """
    start = time.monotonic()
    transfer = _Transfer(download, sink, net, deadline, max_bytes)
    persistently(transfer.advance, deadline, net.patience.pause)
    digest = transfer.sha256()
    logger.info("%s: fetched %d bytes in %.1f s", download.name, transfer.count, time.monotonic() - start)
    return digest


class _Transfer:
    """A file on its way, over as many connections as it takes. count: how many of its bytes are in the sink."""

    def __init__(self, download: Download, sink: Sink, net: Network, deadline: Deadline, max_bytes: int) -> None:
        self.download = download
        self.sink = sink
        self.net = net
        self.deadline = deadline
        self.max_bytes = max_bytes
        self.count = 0
        self._size: int | None = None  # of the whole file, as it is declared
        self._digest = hashlib.sha256()
        self._etag: str | None = None

    def advance(self) -> None:
        """Fetch what is missing, over one connection. Raises Unreachable where a further connection may bring more."""
        range_headers = self._range_headers()
        with self.net.get(self.download.url, {**self.download.headers, **range_headers}, self.deadline) as answer:
            if "Range" in range_headers and answer.status in (206, 416):
                self._resume(answer)
            else:
                self._begin(answer)
            self._receive(answer)
        if self._size is not None and self.count < self._size:  # of a body without a length, or with another one
            raise Unreachable(f"{answer.who} broke off after {self.count} of {self._size} bytes. Try again later.")

    def sha256(self) -> str:
        """In hex, of all that was written. Raises SourceError where the authority names another."""
        digest = self._digest.hexdigest()
        if self.download.sha256 not in (None, digest):
            raise self._refusal("is not the file that was named: its sha256 is another. Expected the same bytes.")
        return digest

    def _range_headers(self) -> dict[str, str]:
        """The headers that ask for the rest of the file; {} to begin anew, where nothing would tell that it is the same
        file."""
        if not self.count or not (self._etag or self.download.sha256):
            return {}
        return {"Range": f"bytes={self.count}-"} | ({"If-Range": self._etag} if self._etag else {})

    def _resume(self, answer: Answer) -> None:
        stated = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        first, last, total = map(int, stated.groups()) if stated else (0, 0, 0)
        same = self._etag is None or answer.headers.get("ETag", self._etag) == self._etag
        same = same and self._size in (None, total)
        if answer.status != 206 or not same or (first, last) != (self.count, total - 1):
            self._restart()
            raise Unreachable(f"{answer.who} sent another part of the file than was asked for. Try again later.")
        self._size = total

    def _begin(self, answer: Answer) -> None:
        answer.require(200)
        if self.count:
            self._restart()
        etag = answer.headers.get("ETag", "")
        # A weak one, W/"...", stands for bytes that may differ.
        self._etag = etag if etag.startswith('"') and etag.isascii() and etag.isprintable() else None
        self._size = self.download.size if answer.length is None else answer.length
        if self._size is not None and self._size > self.max_bytes:
            raise self._refusal(f"is {self._size} bytes long. Expected at most {self.max_bytes}.")

    def _receive(self, answer: Answer) -> None:
        pace, head = _Pace(self.net.patience, answer.who), b""
        while data := answer.read(READ_BYTES):
            pace.add(len(data))
            if not self.count:  # nothing is written before it is known what it is
                data = head = head + data
                if len(head) < HEAD_BYTES:
                    continue
                self._recognise(head, answer)
            self._write(data)
        if not self.count:
            self._recognise(head, answer)
            self._write(head)

    def _recognise(self, head: bytes, answer: Answer) -> None:
        kind = unlike_lora(head) if self.download.holds_weights else unlike_json(head)
        if kind == WEB_PAGE and answer.redirected and _LOGIN.search(urlsplit(answer.url).path):
            raise Denied(f"{answer.who} wants a login for {self.download.name}. Expected a public file, or a token.")
        if kind:
            raise self._refusal(f"looks like {kind}. {EXPECTED}")
        size = self.download.size  # compared once it is known to be a file: pages have sizes of their own
        if size not in (None, self._size):
            raise self._refusal(f"is {self._size} bytes long. Expected {size}, as its authority says.")

    def _write(self, data: bytes) -> None:
        most = self.max_bytes if self._size is None else min(self._size, self.max_bytes)
        if self.count + len(data) > most:
            raise self._refusal(f"does not end after {most} bytes. Expected it to.")
        self._digest.update(data)
        self.sink.write(data)
        self.count += len(data)

    def _restart(self) -> None:
        self.sink.restart()
        self._digest = hashlib.sha256()
        self.count, self._size, self._etag = 0, None, None

    def _refusal(self, sentence: str) -> SourceError:
        return SourceError(f"{self.download.name} {sentence}")


class _Pace:
    """Whether bytes come fast enough: a server that sends one now and then would hold a request to its deadline."""

    def __init__(self, patience: Patience, who: str) -> None:
        self.patience = patience
        self.who = who
        self.start = time.monotonic()
        self.count = 0

    def add(self, count: int) -> None:
        """Count bytes that came. Raises Unreachable at the end of a window that had too few."""
        self.count += count
        seconds = time.monotonic() - self.start
        if seconds < self.patience.window:
            return
        if self.count < self.patience.rate * seconds:
            raise Unreachable(f"{self.who} sends less than {self.patience.rate} bytes a second. Try again later.")
        self.start, self.count = time.monotonic(), 0
