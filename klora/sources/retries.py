"""Trying again what may succeed the next time, with pauses, before a deadline."""

import logging
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from klora.sources.deadline import Deadline
from klora.sources.download import Unreachable

logger = logging.getLogger(__name__)

RETRIES = 3

T = TypeVar("T")


class Busy(Unreachable):
    """Raised when a server says that it cannot answer now. retry_after: the seconds it asks for."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def persistently(attempt: Callable[[], T], deadline: Deadline, pause: float) -> T:
    """attempt(), up to RETRIES times again while it raises Unreachable. pause: seconds before the first retry.

    Raises what the last attempt raised, at once where the deadline comes before the pause is over.
    """
    for n in range(RETRIES):
        try:
            return attempt()
        except Unreachable as error:
            failure = error
        # Jitter, so that those who failed together do not come back together.
        retry_after = failure.retry_after if isinstance(failure, Busy) else 0.0
        wait = max(retry_after, pause * 2**n * random.uniform(0.5, 1.0))
        if wait >= deadline.left():
            raise failure
        logger.info("Trying again in %.1f s: %s", wait, failure)
        deadline.sleep(wait)
    return attempt()


def retry_after_seconds(header: str | None) -> float:
    """The seconds to wait that a Retry-After header states, as a number or a date; 0 where it cannot be read."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
