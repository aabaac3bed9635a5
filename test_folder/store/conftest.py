"""A store in a folder of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from klora.sources.deadline import Deadline


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    with Deadline(20) as deadline:
        yield deadline
