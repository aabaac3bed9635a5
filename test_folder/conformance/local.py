"""Servers that run here, for tests that are given none: script/serve's, each in a folder of its own. Loopback only."""

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from in_venv import ROOT, program

from test_folder.conformance.client import PREDICT, TRAIN, Client

SETUP_SECONDS = 180


@dataclass(frozen=True)
class Place:
    """Where a server's files are. temporary: all that it and Cog write beside what they answer."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def files(self) -> list[Path]:
        return sorted(path for path in self.temporary.rglob("*") if path.is_file())


@contextmanager
def running(
    folder: Path, environment: Mapping[str, str], *, train: bool = False, uploads: str | None = None
) -> Iterator[Client]:
    """A server, once it is ready. uploads: an address, to which it sends what it makes."""
    settings, options = _settings(folder) | environment, ["--upload-url", uploads] if uploads else []
    with Place(folder).log.open("w") as log:
        asked = {"train": train, "seconds": SETUP_SECONDS, "options": options}
        with program("serve").serving(_free_port(), log, settings, **asked) as (url, _):
            yield Client(url, TRAIN if train else PREDICT)


@contextmanager
def trains_alone() -> Iterator[None]:
    """While nobody else who asks for it trains in this clone, whose servers all leave their tar in the same place."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _settings(folder: Path) -> dict[str, str]:
    """What keeps a server out of the user's own folders, and small; the folders it needs are made."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return {"TMPDIR": str(folder / "tmp"), "KLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
