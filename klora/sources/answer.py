"""The answer to one request: its status, its headers and its body, counted; errors are raised in our own words.

Knows nothing of where it comes from, and of files only that they have a length.
"""

import ssl
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from typing import TypeVar

from klora.errors import SourceError
from klora.sources.addresses import Target
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, NotFound, Unreachable
from klora.sources.retries import Busy, retry_after_seconds

_TEMPORARY = (408, 425, 429)  # statuses, as all from 500 on, after which another try may succeed

T = TypeVar("T")


class Answer:
    """The answer to a GET: status, headers and, by read(), its body as it was sent.

    length: of the body, in bytes, None where none is declared.   url: where it came from; may hold secrets.
    redirected: whether that is another address than was asked.   who: its server, as messages call it.
    """

    def __init__(self, response: HTTPResponse, target: Target, deadline: Deadline) -> None:
        self.status: int = response.status
        self.headers: HTTPMessage = response.headers
        self.who = target.who
        self.url = target.url
        self.redirected = False
        self.length = _length(response.headers, target.who)
        self._encoded = any(map(_is_encoding, response.headers.get_all("Content-Encoding", [])))
        self._left = self.length
        self._response = response
        self._deadline = deadline

    def read(self, size: int) -> bytes:
        """The next bytes, at least one and at most size; b"" at the end, where every byte that was declared has come.

        Raises Unreachable where the connection breaks or stalls before that, SourceError where it is compressed.
        """
        if self._encoded:
            raise SourceError(f"{self.who} answers with a compressed body. Expected the file as it is.")
        data = guarded(lambda: self._response.read1(size), self.who, self._deadline)
        if not data:
            self._deadline.left()  # an end that the watchdog made is none
            if self._left:
                raise Unreachable(f"{self.who} broke off {self._left} bytes before the end. Try again later.")
        elif self._left is not None:
            self._left -= len(data)
        return data

    def read_all(self, max_bytes: int) -> bytes:
        """The whole body. Raises SourceError where it is longer than max_bytes, Unreachable where it does not come."""
        parts, count = [], 0
        while data := self.read(1 << 20):
            parts.append(data)
            count += len(data)
            if count > max_bytes:
                raise SourceError(f"{self.who} answers with more than {max_bytes} bytes. Expected a short answer.")
        return b"".join(parts)

    def require(self, *statuses: int) -> None:
        """Raise NotFound, Denied, Unreachable or SourceError, as the status means, unless it is one of these."""
        if self.status in statuses:
            return
        seen = f"{self.who} answers {self.status}"
        if self.status in (404, 410):
            raise NotFound(f"{seen}: there is no such file. Expected the link of one that exists and has not expired.")
        if self.status in (401, 403):
            raise Denied(
                f"{seen}: access is refused. Expected a public file, a signed link that has not expired, or a token "
                "that may read it."
            )
        if self.status in _TEMPORARY or self.status >= 500:
            wait = retry_after_seconds(self.headers["Retry-After"])
            raise Busy(f"{seen}: it cannot serve this now. Try again later.", wait)
        # Google's storage answers 400 to a signed link that has expired.
        raise SourceError(f"{seen}. Expected {' or '.join(map(str, statuses))}, as for a link that has not expired.")


def guarded(action: Callable[[], T], who: str, deadline: Deadline) -> T:
    """action(), with the network's errors raised as a SourceError.

    It quotes nothing of them, nor has them in its chain: they hold paths, headers and addresses, which may be secret.
    """
    try:
        return action()
    except (OSError, HTTPException) as error:
        failure = _translated(error, who)
    deadline.left()  # says so itself, where the watchdog broke the connection
    raise failure


def _translated(error: Exception, who: str) -> SourceError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceError(f"{who} has no valid certificate for its name. Expected one that an authority has signed.")
    if isinstance(error, TimeoutError):
        return Unreachable(f"{who} does not answer in time. Try again later.")
    if isinstance(error, OSError | IncompleteRead):
        return Unreachable(f"{who} cannot be reached, or broke the connection off. Try again later.")
    return SourceError(f"{who} does not answer as a web server does. Expected HTTP with short headers.")


def _length(headers: HTTPMessage, who: str) -> int | None:
    """The body's declared length. Raises SourceError where it is ambiguous."""
    lengths, transfers = headers.get_all("Content-Length", []), headers.get_all("Transfer-Encoding", [])
    framed = [text for text in lengths if text.isascii() and text.isdigit() and len(text) < 19]
    chunked = [text.lower() for text in transfers] == ["chunked"]
    if len(lengths) + len(transfers) > 1 or len(framed) < len(lengths) or (transfers and not chunked):
        raise SourceError(f"{who} does not say clearly how long its answer is. Expected one Content-Length, or chunks.")
    return int(framed[0]) if framed else None


def _is_encoding(text: str) -> bool:
    return text.strip().lower() not in ("", "identity")
