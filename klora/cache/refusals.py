"""What was refused lately, so that the same question is not asked again at once. In memory, bounded."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from klora.errors import SourceError
from klora.sources.download import Denied, NotFound

MAX_REFUSALS = 1000
# How long an error of just this type is remembered; others (unreachable, cancelled, too much for the cache) are not.
# SourceError itself: the file is no LoRA, and those who waited for it need not fetch it again, one after another.
SECONDS = {NotFound: 30.0, Denied: 10.0, SourceError: 10.0}


class Refusals:
    """By the names of refs, so that what is refused in one scope says nothing of another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, SourceError]] = {}

    def check(self, name: str) -> None:
        """Raise again what was raised lately."""
        with self._lock:
            until, error = self._known.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise type(error)(*error.args)

    @contextmanager
    def remembering(self, name: str) -> Iterator[None]:
        """Remember what is raised in the block, and raise it on."""
        try:
            yield
        except SourceError as error:
            if seconds := SECONDS.get(type(error)):
                self._add(name, time.monotonic() + seconds, error)
            raise

    def _add(self, name: str, until: float, error: SourceError) -> None:
        with self._lock:
            self._known.pop(name, None)  # so that the order is that of the last refusals
            self._known[name] = (until, type(error)(*error.args))  # without the frames that a traceback holds
            if len(self._known) > MAX_REFUSALS:
                del self._known[next(iter(self._known))]
