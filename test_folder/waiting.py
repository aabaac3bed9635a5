"""Waiting in tests: for what others do, and for no longer than a loaded machine takes."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def soon(true: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(true())


@contextmanager
def timed(least: float = 0.0, most: float = 10.0) -> Iterator[None]:
    """Check that the block takes at least and at most so many seconds. What goes on if its subject is broken takes
    twice the most, so that no load of the machine decides."""
    start = time.monotonic()
    yield
    assert least <= time.monotonic() - start <= most


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Break off an endless loop in Python code, after this much CPU time: what else runs does not count."""

    def out_of_time(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")  # neither an OSError nor any that is translated

    before = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
