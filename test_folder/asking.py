"""What tests of the network stand on: a public address, and one question asked of a server."""

import socket
from collections.abc import Mapping
from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources.deadline import Deadline
from klora.sources.network import Network
from test_folder.fakes.hostile import reply

PUBLIC = "93.184.215.14"
GOOD = reply(b"good")


def info(address: str, port: int = 443) -> tuple[int, int, int, str, tuple[Any, ...]]:
    """An answer of a resolver."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.SOCK_STREAM, 0, "", (address, port, 0, 0) if ":" in address else (address, port)


def body_of(net: Network, url: str, headers: Mapping[str, str] | None = None, **more: Any) -> bytes:
    """What comes."""
    with Deadline(20) as deadline, net.get(url, headers or {}, deadline, **more) as answer:
        return answer.read_all(1 << 20)


def refusal(net: Network, url: str, kind: type[SourceError] = SourceError, seconds: float = 20.0) -> str:
    """The one sentence with which a question ends."""
    with pytest.raises(kind) as error, Deadline(seconds) as deadline, net.get(url, {}, deadline) as answer:
        answer.read_all(1 << 20)
    assert type(error.value) is kind or kind is not SourceError
    return str(error.value)
