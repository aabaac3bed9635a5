"""A hub on 127.0.0.1 that has one small base, what fetches it from there, and a program in the place of pget."""

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from klora.bases.install import ensure_base
from klora.bases.pget import Pget
from klora.bases.table import Base
from klora.errors import BaseModelError
from test_folder.fakes.base_hub import BASE, MACHINES_TOKEN, SIGNATURE, TOKEN, Hub, Server, serving
from test_folder.fakes.pget import FakePget


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def hub(server: Server) -> Hub:
    return server.hub


@pytest.fixture
def ensure(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """ensure_base of our hub's repository into tmp_path/tiny."""

    def ensure(base: Base = BASE, token: str | None = None, pget: Pget | None = None) -> Path:
        return ensure_base("tiny", base, tmp_path, token, pget, endpoint=server.address)

    return ensure


@pytest.fixture
def refusal(ensure: Callable[..., Path]) -> Callable[..., str]:
    """What ensure says when it refuses, which names no secret, nor does its traceback."""

    def refusal(*given: object, **named: object) -> str:
        with pytest.raises(BaseModelError) as error:
            ensure(*given, **named)
        told = "".join(traceback.format_exception(error.value))
        assert not [secret for secret in (TOKEN, MACHINES_TOKEN, SIGNATURE) if secret in told]
        return str(error.value)

    return refusal


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakePget:
    return FakePget(tmp_path_factory.mktemp("bin") / "bin")
