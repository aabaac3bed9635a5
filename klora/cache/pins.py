"""Who is using a file: users share its flock, and whoever would remove it must hold it alone.

The kernel drops the locks of a killed process, so nothing in use outlives its user. Knows nothing of LoRAs.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from klora.sources.deadline import Deadline

_PAUSE = 0.001  # seconds between two tries to pin
_PATIENCE = 0.2  # seconds that a pin waits for somebody who holds a file alone: to look, or to remove it
_LOOK = 0.1  # seconds between two looks at the deadline while waiting


class Pin:
    """A shared lock on a file or a folder. Whoever holds one may count on its staying there until it is closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """The descriptor that holds the lock."""
        return self._descriptor

    def size(self) -> int:
        """Of the file, in bytes."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Let go of it; also a second time."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close


def pin(path: Path, flags: int = os.O_RDONLY) -> Pin | None:
    """Share a file or a folder; None where there is none, or it is just being removed. flags, mode 0400: as for open.

    Raises OSError where it cannot be opened for another reason: a symbolic link, a descriptor too many.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return _locked(path, fcntl.LOCK_SH, flags)
        except BlockingIOError:
            if time.monotonic() > end:
                return None
            time.sleep(_PAUSE)


@contextmanager
def seized(path: Path) -> Iterator[bool]:
    """Whether nobody uses what is at this path, and nobody will until the end of the block."""
    try:
        held = _locked(path, fcntl.LOCK_EX)
    except OSError:  # in use; or no file that could be
        held = None
    with held or nullcontext():
        yield held is not None


def _locked(path: Path, operation: int, flags: int = os.O_RDONLY) -> Pin | None:
    with suppress(FileNotFoundError), ExitStack() as stack:
        locked = Pin(os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o400))
        stack.enter_context(locked)
        fcntl.flock(locked.fileno(), operation | fcntl.LOCK_NB)
        # Between open and flock somebody may have removed or replaced it: then the lock is of nothing.
        if not os.path.samestat(os.fstat(locked.fileno()), path.lstat()):
            raise BlockingIOError(f"{path} is another file by now")
        stack.pop_all()
        return locked
    return None


@contextmanager
def alone(path: Path, deadline: Deadline, pause: float = 0.005) -> Iterator[None]:
    """Hold a lock file alone among all threads and processes. Raises Unreachable or Cancelled at the deadline.

    pause: seconds between two tries.  The lock file goes before it is released; filelock notices that, and has those
    who wait begin again.
    """
    lock = FileLock(path, mode=0o600, poll_interval=pause, fallback_to_soft=False)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=min(deadline.left(), _LOOK))
        except Timeout:  # look at the deadline again: it may have been cancelled
            continue
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
