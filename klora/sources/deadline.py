"""How long things may take: an Allowance for all that a request fetches, a Deadline for what of it is fetched at once,
and Patience for a single wait.

Knows sockets only as what can be shut from another thread.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

from klora.errors import SourceError
from klora.sources.download import Unreachable


class Cancelled(SourceError):
    """Raised in whoever waits under a deadline that was cancelled from elsewhere: nobody wants the answer any more."""


@dataclass(frozen=True)
class Patience:
    """How long a single wait may last, in seconds.

    connect: for a name to be resolved, for a connection, for its encryption.   read: for the next bytes.
    pause: before the first retry; doubled at each.   rate: in bytes a second, what must come on average over a window.
    """

    connect: float = 5.0
    read: float = 20.0
    pause: float = 0.5
    rate: int = 10_000
    window: float = 30.0


class Deadline:
    """The end of everything that waits under it: seconds from now, or cancel(), whichever comes first.

    Timeouts of single reads do not add up to a bound (a server may send a byte within each), hence a watchdog: whatever
    is under watch when the end comes is shut from another thread, and so nothing blocks longer. As a context manager it
    is cancelled when the block ends, however it does.   late: the message of Unreachable after the end.
    """

    def __init__(self, seconds: float, late: str | None = None) -> None:
        self._end = time.monotonic() + seconds
        self._late = late or f"The download took longer than {seconds:g} seconds. Expected a faster source."
        self._lock = threading.Lock()
        self._stops: list[Callable[[], None]] = []
        self._ended = threading.Event()
        self._cancelled = False
        self._watchdog: threading.Timer | None = None

    def left(self) -> float:
        """Seconds until the end. Raises Unreachable after it, Cancelled after cancel()."""
        left = self._end - time.monotonic()
        if self._cancelled:
            raise Cancelled("The download was cancelled.")
        if left <= 0 or self._ended.is_set():
            raise Unreachable(self._late)
        return left

    def sleep(self, seconds: float) -> None:
        """Wait, at most until the end. Raises as left() does."""
        self._ended.wait(min(seconds, self.left()))
        self.left()

    def watch(self, sock: socket.socket) -> AbstractContextManager[None]:
        """Have the socket shut at the end, if that comes while the block runs."""
        # SSLSocket.shutdown forgets its encryption first: a read under way would then take ciphertext for the body.
        return self.interrupting(partial(socket.socket.shutdown, sock, socket.SHUT_RDWR))

    @contextmanager
    def interrupting(self, stop: Callable[[], None]) -> Iterator[None]:
        """Have stop() called at the end, from another thread, if that comes while the block runs.

        stop: must not block; an OSError of its own is ignored.
        """
        with self._lock:
            self._stops.append(stop)
            if self._watchdog is None and not self._ended.is_set():
                self._watchdog = threading.Timer(max(0.0, self._end - time.monotonic()), self._stop)
                self._watchdog.daemon = True
                self._watchdog.start()
        if self._ended.is_set():
            self._stop()
        try:
            yield
        finally:
            with self._lock:  # so that nothing is stopped once the block has ended: a socket's number is used again
                self._stops.remove(stop)

    def cancel(self) -> None:
        """End it now, from any thread: whoever waits under it gets Cancelled."""
        self._cancelled = True
        self._stop()

    def _stop(self) -> None:
        self._ended.set()  # first: who is woken asks left() why
        with self._lock:
            for stop in self._stops:
                with suppress(OSError):  # closed, or not connected yet
                    stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._watchdog is not None:
                self._watchdog.cancel()
        self.cancel()  # what still waits under it in other threads ends, too


class Allowance:
    """The seconds that all downloads of a request have together, where these come one after another."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._late = f"All downloads of this request took longer than {seconds:g} seconds. Expected faster sources."

    @contextmanager
    def deadline(self) -> Iterator[Deadline]:
        """A Deadline in as many seconds as are left; afterwards those that the block took are subtracted."""
        started = time.monotonic()
        try:
            with Deadline(self._left, self._late) as deadline:
                yield deadline
        finally:
            self._left -= time.monotonic() - started
