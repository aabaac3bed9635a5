"""Answers from where users say, guarded: every hop checked, credentials for the first origin alone.

Knows nothing of files, and of authorities only that they speak JSON.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from klora.errors import SourceError
from klora.sources.addresses import parse_url
from klora.sources.answer import Answer
from klora.sources.connection import Dialler
from klora.sources.deadline import Deadline, Patience
from klora.sources.retries import persistently

AGENT = "klora"  # an authority turns away libraries that do not say who they are

MAX_REDIRECTS = 5  # one after another
REDIRECTS = (301, 302, 303, 307, 308)
_HARMLESS = {"accept", "content-type", "if-range", "range", "user-agent"}  # those that tell no secret to another origin


@dataclass(frozen=True)
class Network:
    """The way out. trusted: "host:port" that the operator allows although they are http or private."""

    trusted: frozenset[str] = frozenset()
    dialler: Dialler = field(default_factory=Dialler)

    @property
    def patience(self) -> Patience:
        """How long single waits may last."""
        return self.dialler.patience

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str], deadline: Deadline, *, follow: bool = True) -> Iterator[Answer]:
        """The answer to a GET, of whatever status; a redirect itself unless follow.

        headers: for the origin of url; of them only the harmless ones go on to another, and the rest never comes back.
        Raises SourceError where a hop may not be taken, Unreachable where it does not answer.
        """
        target, sent = parse_url(url, self.trusted), _checked({"User-Agent": AGENT, **headers})
        for hop in range(MAX_REDIRECTS + 1):
            with self.dialler.answer(target, sent, deadline) as answer:
                answer.redirected = hop > 0
                location = answer.headers["Location"]
                if not follow or answer.status not in REDIRECTS or not location:
                    yield answer
                    return
            next_target = target.redirected(location, self.trusted)
            if next_target.origin != target.origin:
                sent = {name: value for name, value in sent.items() if name.lower() in _HARMLESS}
            target = next_target
        raise SourceError(f"The link is redirected more than {MAX_REDIRECTS} times. Expected the file.")

    def json(self, url: str, headers: Mapping[str, str], deadline: Deadline, max_bytes: int = 4 << 20) -> Any:
        """What a fixed authority says in JSON. Raises NotFound, Denied, Unreachable or SourceError."""

        def attempt() -> tuple[str, bytes]:
            with self.get(url, {"Accept": "application/json", **headers}, deadline) as answer:
                answer.require(200)
                return answer.who, answer.read_all(max_bytes)

        who, body = persistently(attempt, deadline, self.patience.pause)
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            pass  # raised below: the decoder's error holds the whole text
        raise SourceError(f"{who} answers with something else than JSON. Expected its API.")


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    """Raises SourceError for what http.client would refuse by quoting it."""
    for name, value in headers.items():
        if not (value.isascii() and value.isprintable()):
            raise SourceError(f"{name} for the request holds a character that it may not. Expected a token in ASCII.")
    return dict(headers)
