"""JSON over HTTP with one server, and how a request to it stands. Knows no kind of server and no page."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from playground.errors import PlaygroundError

SECONDS = 30.0  # for whatever is no prediction
SILENT_SECONDS = 120.0  # after which a server that answers no poll is taken to be gone
_PROGRESS = re.compile(r"^\s*\d+%\s*\|.*?\|\s*(\d+)/(\d+)(?:, *)?(.*)$", re.MULTILINE)  # as tqdm writes it
_WRAPPING = re.compile(r"^(?:(?:Prediction|Training) failed: )+(?:\w+Error: )?")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """How a request stands. status: waiting, starting, processing, and at its end succeeded, failed or canceled.

    output: as the server gives it, at the end.  error: the server's sentence, where it failed.
    """

    status: str
    logs: str = ""
    output: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def told_by(cls, answer: Mapping[str, Any]) -> "Run":
        """From what a server answers."""
        error = _WRAPPING.sub("", str(answer.get("error") or ""))
        metrics = answer.get("metrics") or {}
        return cls(answer.get("status", "processing"), answer.get("logs") or "", answer.get("output"), metrics, error)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.status in ("succeeded", "failed", "canceled")

    @property
    def step(self) -> tuple[int, int, str] | None:
        """(step, steps, what is said beside them) as the log last tells; None before the first."""
        lines = _PROGRESS.findall(self.logs)
        return (int(lines[-1][0]), int(lines[-1][1]), lines[-1][2].strip()) if lines else None


class Connection:
    """The way to one server. The token goes to that server's own address and nowhere else.

    url: http or https.  Raises PlaygroundError for another, for a token that would travel unencrypted, or can not.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        url = url.strip()
        self.url, self._origin = url.rstrip("/"), _origin(url)
        scheme, host, _ = self._origin
        if scheme not in ("http", "https") or not host or urlsplit(url).username:
            raise PlaygroundError(
                "The server's address is no http or https URL. Expected one as http://127.0.0.1:5000."
            )
        if token and scheme == "http" and host not in ("127.0.0.1", "localhost", "::1"):
            raise PlaygroundError(f"A token would travel unencrypted to {host}. Expected an https URL.")
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise PlaygroundError(
                "The token holds a sign that no header can. Expected letters, digits and punctuation."
            )
        self._token = token

    def call(self, method: str, address: str, body: Any = None, seconds: float | None = SECONDS) -> tuple[int, Any]:
        """(status, the JSON or the text of the answer). address: beneath the server's own, or another of its origin.

        seconds: to wait for the answer; None: for ever.  Raises PlaygroundError where none comes.
        """
        url = address if "://" in address else f"{self.url}{address}"
        if _origin(url) != self._origin:
            raise PlaygroundError(f"The server names {_shown(url)} as a place to ask. Expected one of its own.")
        try:
            answer = requests.request(
                method, url, json=body, auth=self._sign, timeout=(10, seconds), allow_redirects=False
            )
            is_json = "json" in answer.headers.get("Content-Type", "")
            return answer.status_code, answer.json() if is_json else answer.text
        except requests.RequestException as error:  # its text may hold headers
            raise PlaygroundError(f"{_shown(self.url)} does not answer: {type(error).__name__}.") from None

    def get(self, address: str) -> Mapping[str, Any]:
        """The JSON object there. Raises PlaygroundError."""
        return taken(*self.call("GET", address))

    def fetch(self, url: str) -> bytes:
        """A file that the server made and put somewhere; that place is told no token. Raises PlaygroundError."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise PlaygroundError(f"The server gives {_shown(url)!r} as a file. Expected an http, https or data URI.")
        try:
            answer = requests.get(url, auth=_unsigned, timeout=(10, SECONDS))
            answer.raise_for_status()
        except requests.RequestException as error:  # its text holds the URL, which may be signed
            raise PlaygroundError(f"A file at {_shown(url)} does not come: {type(error).__name__}.") from None
        return answer.content

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Also where there is no token: requests would look into ~/.netrc for one."""
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Patience:
    """With a server that is asked again and again how a request stands: a poll that is lost says nothing of a request
    that may have run for hours."""

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def answer(self, poll: Callable[[], T | None]) -> T | None:
        """What it answers; None where none comes. Raises PlaygroundError where none has for SILENT_SECONDS."""
        try:
            answer = poll()
        except PlaygroundError:
            if time.monotonic() > self._heard + SILENT_SECONDS:
                raise
            return None
        self._heard = time.monotonic()
        return answer


def taken(status: int, answer: Any) -> Mapping[str, Any]:
    """The JSON object that a server answers. Raises PlaygroundError for a refusal, and for what is no such object, as a
    gateway's page to sign in at is."""
    if status not in (200, 201, 202) or not isinstance(answer, dict):
        raise PlaygroundError(refusal(status, answer))
    return answer


def refusal(status: int, answer: Any) -> str:
    """What a server, or a gateway before it, says of a request that it does not take."""
    said = answer if isinstance(answer, dict) else {}
    detail = said.get("detail") or said.get("error") or said.get("title") or answer
    try:
        faults = " ".join(f"{fault['loc'][-1]}: {fault['msg'].rstrip('.')}." for fault in detail)
    except (TypeError, KeyError, IndexError):  # other than a form finds them
        faults = ""
    return faults or f"The server answers {status}: {str(detail)[:300]}"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:  # a port that is no number, a bracket that is not closed
        return "", None, None


def _shown(url: str) -> str:
    """Without what may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _unsigned(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
