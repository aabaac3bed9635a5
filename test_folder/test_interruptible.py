"""Work in another thread: its result, its errors, and an interruption at each place where Python lets one in."""

import ctypes
import dis
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from multiprocessing import get_context
from types import FrameType

import pytest

from klora.interruptible import interruptible

FORK = get_context("fork")  # what is left locked in the child stays there
CHECKED_AFTER = {"CALL", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}  # CPython 3.11 looks for signals at these


class Interruption(BaseException):
    """As Cog raises it in whatever the main thread does."""


def test_what_the_work_returns_is_returned_from_another_thread() -> None:
    assert interruptible(threading.get_ident) not in (threading.get_ident(), None)


@pytest.mark.parametrize("error", [ValueError("no"), Interruption()])
def test_what_the_work_raises_is_raised_and_nothing_is_stopped(error: BaseException) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        interruptible(work, pytest.fail)
    assert raised.value is error


def test_no_more_threads_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        interruptible(time.time)


def interrupting(place: int) -> Callable[[FrameType, str, object], object]:
    """Traces a thread, and raises at the so manieth place where a signal is heard."""
    heard, last = 0, dict[FrameType, str]()

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal heard
        frame.f_trace_opcodes = True
        if event != "opcode":
            return trace
        before = last.get(frame)
        last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if before in CHECKED_AFTER:
            heard += 1
            if heard == place:
                sys.settrace(None)
                raise Interruption
        return trace

    return trace


def interrupted(place: int) -> tuple[str, ...] | None:
    """What was done of the work when it was interrupted at that place, and ever after; None where it was not."""
    stopped, told = threading.Event(), list[str]()

    def work() -> None:
        told.append("begun")
        told.append("stopped" if stopped.wait(0.12) else "done")  # longer than two looks

    sys.settrace(interrupting(place))
    try:
        interruptible(work, stopped.set)
    except Interruption:
        then = tuple(told)
        time.sleep(0.001)
        assert tuple(told) == then
        return then
    finally:
        sys.settrace(None)
    return None


def interrupted_everywhere() -> None:
    seen = set(iter(map(interrupted, count(1)).__next__, None))
    assert seen == {(), ("begun", "stopped"), ("begun", "done")}


def test_an_interruption_at_any_place_leaves_no_work_under_way_and_blocks_nothing() -> None:
    process = FORK.Process(target=interrupted_everywhere)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("heard", ["by a signal's handler", "from another thread"])
def test_an_interruption_is_heard_at_once(heard: str) -> None:
    stopped = threading.Event()
    caller = threading.get_ident()

    def interrupt() -> None:
        time.sleep(0.2)
        if heard == "from another thread":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(Interruption))
        else:
            signal.pthread_kill(caller, signal.SIGUSR1)

    def hear(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGUSR1, hear)
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(1) as pool, pytest.raises(Interruption):
            pool.submit(interrupt)
            interruptible(lambda: stopped.wait(20), stopped.set)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - start < 5
