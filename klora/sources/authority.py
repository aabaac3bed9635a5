"""What asking any authority has in common: the requests, the token's header, plain names and words from answers."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urljoin

from klora.errors import SourceError
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Unreachable
from klora.sources.network import REDIRECTS, Network
from klora.sources.retries import persistently

MAX_NAME = 80  # characters
MAX_WORDS, MAX_WORD = 20, 200  # triggers of one LoRA; characters of one


@dataclass(frozen=True)
class Client:
    """One user's requests to one authority; each is tried again while the authority does not answer.

    endpoint: the authority's address, without a slash at the end.  headers: of every request, the user's token among
    them if there is one.  All methods raise NotFound, Denied, Unreachable or SourceError.
    """

    endpoint: str
    headers: Mapping[str, str] = field(repr=False)
    network: Network
    deadline: Deadline

    def json(self, url: str) -> Any:
        """What url answers in JSON."""
        return self.network.json(url, self.headers, self.deadline)

    def check_access(self, url: str) -> None:
        """Raise unless url, or what it redirects to, answers 200."""

        def attempt() -> None:
            with self.network.get(url, self.headers, self.deadline) as answer:
                answer.require(200)

        persistently(attempt, self.deadline, self.network.patience.pause)

    def redirection(self, url: str) -> str | None:
        """The address that url redirects to, in full, without going there; None where url answers itself."""

        def attempt() -> str | None:
            with self.network.get(url, self.headers, self.deadline, follow=False) as answer:
                answer.require(200, *REDIRECTS)
                location = answer.headers["Location"] if answer.status in REDIRECTS else None
                with understood(answer.who):
                    return location and urljoin(url, location)

        return persistently(attempt, self.deadline, self.network.patience.pause)


def bearer(token: str | None, authority: str) -> dict[str, str]:
    """The header that carries a user's token; none without one. Raises Denied where it cannot be a token."""
    token = (token or "").strip()
    if not re.fullmatch(r"[!-~]{0,1000}", token):  # a line break would begin a header of the user's own
        raise Denied(
            f"The token for {authority} holds a space or a letter that none has. Expected it as it was issued."
        )
    return {"Authorization": f"Bearer {token}"} if token else {}


def file_name(path: str) -> str:
    """What a file is called on the disk: the end of its path in letters, digits and "._-", at most 80 of them."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", PurePosixPath(path).name)
    return name[-MAX_NAME:].lstrip(".-") or "lora"


def plain_words(texts: Iterable[Any]) -> tuple[str, ...]:
    """The texts, which authors may write as they like, that are fit for a prompt and a line of a log; without
    repetition, at most MAX_WORDS. For triggers, and names of base models."""
    words = [text.strip(" ,") for text in texts if isinstance(text, str)]
    plain = [word for word in words if word.isprintable() and 0 < len(word) <= MAX_WORD]
    return tuple(dict.fromkeys(plain))[:MAX_WORDS]


@contextmanager
def understood(authority: str) -> Iterator[None]:
    """Have errors of reading an authority's answer raised as Unreachable: an answer of another form is its failure."""
    try:
        yield
    except SourceError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Unreachable(f"{authority} gave an answer that cannot be understood. Try again later.") from error
