"""pget, a program that fetches one public file over many connections. It is never given a secret.

It has no total timeout, writes in place and knows no checksum, so the caller gives it a fresh path and checks what is
there afterwards. Its lock, by default one for the whole machine, is here one for each file.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from klora.errors import BaseModelError

logger = logging.getLogger(__name__)

# Eight connections with a buffer of 32 MB each; pget's own are four a core with 125 MB each.
OPTIONS = ("--force", "--concurrency", "8", "--chunk-size", "32M")
SLOWEST = 5e6  # bytes a second; a slower pget is taken to hang


class PgetError(Exception):
    """Raised when pget has not fetched a file; says why, without its address."""


@dataclass(frozen=True)
class Pget:
    """The binary. patience: seconds that a fetch may take beyond those for its size at the slowest rate."""

    path: Path
    patience: float = 60.0

    def fetch(self, url: str, path: Path, size: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Fetch a file of so many bytes into a path, until it is there, too slow, or stopped. Raises PgetError."""
        lock = path.with_name(f"{path.name}.pid")
        command = [str(self.path), *OPTIONS, "--pid-file", str(lock), url, str(path)]
        seconds = self.patience + size / SLOWEST
        end = time.monotonic() + seconds
        try:
            status = _run(command, lambda: stopped() or time.monotonic() > end)
        except OSError as error:
            raise PgetError(f"it cannot be run: {error.strerror}") from error
        finally:
            lock.unlink(missing_ok=True)
        if status is None:
            raise PgetError("it was stopped" if stopped() else f"it took more than {seconds:.0f} s")
        if status != 0:
            raise PgetError(f"it ended with status {status}")


def _run(command: list[str], stopped: Callable[[], bool]) -> int | None:
    """Run a command and return its exit status; once stopped() is true, kill its process group and return None.

    The environment is empty, because ours may hold tokens, and pget takes settings from its own. The output is thrown
    away, because it shows addresses.
    """
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        command, env={}, start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing
    ) as process:
        try:
            while not stopped():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(0.1)
            return None
        finally:
            if process.returncode is None:  # else its number may be another's by now
                os.killpg(process.pid, signal.SIGKILL)


def find_pget(sha256: str | None, command: str = "pget") -> Pget | None:
    """The pget of this name or path, if it is there and is the trusted one. Raises BaseModelError where it is another.

    sha256: of the binary that is trusted, in hex. Without it pget is not used.
    """
    binary = shutil.which(command)
    if binary is None:
        logger.info("pget is not installed: huggingface_hub fetches the base models.")
        return None
    if not sha256:
        logger.info("%s is not used, for nothing says which SHA-256 it must have: set KLORA_PGET_SHA256.", binary)
        return None
    with Path(binary).open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256.strip().lower():
        raise BaseModelError(
            f"{binary} has the SHA-256 {actual}. Expected {sha256}, to which KLORA_PGET_SHA256 is set."
        )
    return Pget(Path(binary).absolute())
