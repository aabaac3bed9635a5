"""One fetch from a server on this machine."""

import hashlib
from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources.deadline import Deadline
from klora.sources.download import Download, Unreachable
from klora.sources.fetch import fetch
from test_folder.fakes import Memory, network
from test_folder.fakes.hostile import Hostile
from test_folder.test_formats import GOOD

SHA256 = hashlib.sha256(GOOD).hexdigest()


def fetched(server: Hostile, path: str = "/x", *, seconds: float = 20.0, most: int = 1 << 20, **known: Any) -> Memory:
    """What came; also checks that the sha256 is of that."""
    sink, download = Memory(), Download("url:x", "x.safetensors", server.url(path), **known)
    with Deadline(seconds) as deadline:
        digest = fetch(download, sink, network(server), deadline, most)
    assert digest == hashlib.sha256(sink.data).hexdigest()
    return sink


def refusal(server: Hostile, kind: type[SourceError] = SourceError, path: str = "/x", **known: Any) -> str:
    with pytest.raises(kind) as error:
        fetched(server, path, **known)
    assert type(error.value) is kind or kind is Unreachable
    return str(error.value)
