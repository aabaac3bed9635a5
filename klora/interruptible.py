"""Work that is interrupted safely: another thread does it, and whoever hears signals waits in C alone.

What a signal's handler raises, or Cog for a cancelled prediction, comes between any two bytecodes of the main thread.
Between two of Condition.__enter__, which is Python's own Python, it leaves the lock taken for good
(python/cpython#74174); then a pool's thread that needs it waits for ever, and so does whoever waits for the pool.
It can also come up in a thread that the main one has just started: in CPython 3.11 a newborn one has its parent's
number. That one dies of it, and Thread.start() waits for it for ever. So the threads here are children of one that
nobody interrupts, and so are those that a library starts in them, as transformers does to load. A server calls
patch_thread_start() for the others: Cog starts one for a request's files, and tqdm, compilers and hubs theirs.
"""

import os
import threading
from _thread import start_new_thread
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import sleep
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
LOOK = 0.05  # seconds between two bytecodes of who waits: what Cog raises comes at the next one
PAUSE = 0.05  # seconds between two looks at whether interrupted work has ended


def interruptible(work: Callable[[], Result], stop: Callable[[], object] = lambda: None) -> Result:
    """What work returns or raises, done in a thread of its own.

    stop: makes the work end soon, if it does not by itself. What is raised here meanwhile calls it, waits for the end
    of the work, whatever else is raised until then, and is raised again. Work that has not begun by then never does.
    """
    word: SimpleQueue[bool] = SimpleQueue()
    ended: SimpleQueue[Future[Result]] = SimpleQueue()
    try:
        _STARTER.unborn.put((threading.Thread(target=_do, args=(work, word, ended), daemon=True), ended))
        try:
            word.put(True)
            outcome = _heard(ended)
        except BaseException:
            stop()
            _outlasted(ended)
            raise
    finally:
        word.put(False)  # for a thread whose start was interrupted, which would wait for the word
    return outcome.result()


def in_threads(
    do: Callable[[Item], Result],
    items: Iterable[Item],
    stop: Callable[[], object] = lambda: None,
    at_once: int | None = None,
) -> list[Result]:
    """What do returns for each item, some at once. After an error none is begun, nor after an interruption.

    stop: makes those under way end soon, if they do not by themselves.
    """
    pool = ThreadPoolExecutor(at_once)

    def work() -> list[Result]:
        with pool:
            return list(pool.map(do, items))

    def end() -> None:
        pool.shutdown(wait=False, cancel_futures=True)
        stop()

    return interruptible(work, end)


def patch_thread_start() -> None:
    """From now on no thread of this process is born of one that may be interrupted. Needed below Python 3.12."""
    threading._start_new_thread = _start_safely  # type: ignore[attr-defined]


class _Starter:
    """Starts threads in one of its own, which is begun when this module is imported, and again in a forked process."""

    def __init__(self) -> None:
        self.begin()
        if hasattr(os, "register_at_fork"):  # Windows has no forks
            os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        self.unborn: SimpleQueue[tuple[threading.Thread, SimpleQueue[Future[Any]]]] = SimpleQueue()
        self.thread = start_new_thread(_start_all, (self.unborn.get,))


def _start_all(get: Callable[[], tuple[threading.Thread, SimpleQueue[Future[Any]]]]) -> None:
    while True:
        _start(*get())


def _start(thread: threading.Thread, ended: SimpleQueue[Future[Any]]) -> None:
    try:
        thread.start()
    except RuntimeError as error:  # the machine has no more threads, perhaps
        outcome: Future[Any] = Future()
        outcome.set_exception(error)
        _tell(outcome, ended)


def _start_safely(*work: Any) -> int:
    """As start_new_thread()."""
    safe = threading.get_ident() == _STARTER.thread
    return start_new_thread(*work) if safe else interruptible(lambda: start_new_thread(*work))


_STARTER = _Starter()


def _do(work: Callable[[], Result], word: SimpleQueue[bool], ended: SimpleQueue[Future[Result]]) -> None:
    outcome: Future[Result] = Future()
    if word.get():
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)
    _tell(outcome, ended)


def _tell(outcome: Future[Result], ended: SimpleQueue[Future[Result]]) -> None:
    """Twice, for who has taken the first may have been interrupted before it was anybody's."""
    ended.put(outcome)
    ended.put(outcome)


def _outlasted(ended: SimpleQueue[Future[Result]]) -> None:
    """Wait, as often as Ctrl-C may be pressed: work that is left to itself dies half done with the process. Takes
    nothing, of which each interruption could lose one."""
    while ended.empty():
        with suppress(BaseException):
            sleep(PAUSE)


def _heard(ended: SimpleQueue[Future[Result]]) -> Future[Result]:
    while True:
        with suppress(Empty):
            return ended.get(timeout=LOOK)
