"""A file in the making: what a download is written to, and whose room is reserved before the bytes come."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from klora.cache.pins import Pin
from klora.errors import SourceError

STEP = 64 << 20  # bytes by which a draft of unknown size grows
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskError(SourceError):
    """Raised when the disk does not do what the cache asks of it."""


class DiskFullError(DiskError):
    """Raised when the disk, or a quota, takes no more, whatever the cache's own account says."""


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what the disk refuses into DiskError: an OSError would look like a broken connection."""
    try:
        yield
    except OSError as error:
        kind = DiskFullError if error.errno in _FULL else DiskError
        raise kind(
            f"The LoRA cache cannot be written: {error.strerror}. Expected a disk with room, or another try later."
        ) from error


class Draft:
    """The sink of a download. Its file is as long as what is reserved, and in use while its pin is held.

    reserve(draft, length): makes room for length bytes in all, and the file that long.
    """

    def __init__(self, path: Path, pin: Pin, reserve: Callable[["Draft", int], None]) -> None:
        self.path, self.pin, self._reserve = path, pin, reserve
        self.written = 0
        self.reserved = 0

    def write(self, data: bytes) -> None:
        """Append. Raises CacheFullError or DiskError."""
        end = self.written + len(data)
        if end > self.reserved:
            self._reserve(self, max(end, self.reserved + STEP))
        with disk_errors():
            rest = memoryview(data)
            while rest:
                count = os.pwrite(self.pin.fileno(), rest, self.written)
                self.written += count
                rest = rest[count:]

    def restart(self) -> None:
        """Forget all that was written; what is reserved stays so."""
        self.written = 0

    def finish(self) -> None:
        """Cut the file to what was written, and have it on the disk."""
        with disk_errors():
            os.ftruncate(self.pin.fileno(), self.written)
            os.fsync(self.pin.fileno())
