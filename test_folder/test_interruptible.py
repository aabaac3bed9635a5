"""Work in another thread: its result, its errors, and an interruption at each place where Python lets one in."""

import _thread
import _weakrefset
import ctypes
import dis
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import klora.interruptible
from klora.errors import BaseModelError
from klora.interruptible import in_threads, interruptible, patch_thread_start
from test_folder.waiting import soon, timed

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
        if frame.f_code.co_filename == _weakrefset.__file__:
            return None  # a weak reference's callback, of which Python ignores what it raises
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


def interrupted(place: int, seconds: float) -> tuple[str, ...] | None:
    """What was done, and ever after, of work of so many seconds that was interrupted at that place; None where it was
    not."""
    gc.disable()  # Python ignores what its callbacks raise, too
    stopped, told = threading.Event(), list[str]()

    def work() -> None:
        told.append("begun")
        told.append("stopped" if stopped.wait(seconds) else "done")

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


def at_every_place_of_one_look() -> None:
    klora.interruptible.LOOK = 60.0
    seen = set(iter(map(interrupted, count(1), repeat(0.05)).__next__, None))
    assert {(), ("begun", "done")} <= seen <= {(), ("begun", "stopped"), ("begun", "done")}


def at_every_place_of_several_looks() -> None:
    klora.interruptible.LOOK = 0.002
    assert set(map(interrupted, range(1, 80), repeat(60.0))) == {(), ("begun", "stopped")}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="signals are heard at other bytecodes")
@pytest.mark.parametrize("all_places", [at_every_place_of_one_look, at_every_place_of_several_looks])
def test_an_interruption_at_any_place_leaves_no_work_and_no_thread_and_blocks_nothing(
    all_places: Callable[[], None],
) -> None:
    def and_alone_after_it() -> None:
        all_places()
        assert soon(lambda: threading.active_count() == 1)

    process = FORK.Process(target=and_alone_after_it)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def interrupt_by_a_signal(thread: int) -> None:
    time.sleep(0.2)
    signal.pthread_kill(thread, signal.SIGUSR1)


def interrupt_as_cog_does(thread: int) -> None:
    time.sleep(0.2)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Interruption))


@pytest.mark.parametrize("interrupt", [interrupt_by_a_signal, interrupt_as_cog_does])
def test_an_interruption_is_heard_at_once(interrupt: Callable[[int], None]) -> None:
    stopped = threading.Event()

    def hear(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGUSR1, hear)
    try:
        with timed(), ThreadPoolExecutor(1) as pool, pytest.raises(Interruption):
            pool.submit(interrupt, threading.get_ident())
            interruptible(lambda: stopped.wait(20), stopped.set)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_work_that_is_left_to_its_end_is_waited_for_however_often_it_is_interrupted() -> None:
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(1)
        done.set()

    def hear(*_: object) -> None:
        raise Interruption

    def three_times(thread: int) -> None:
        begun.wait(20)
        for _ in range(3):
            interrupt_by_a_signal(thread)

    before = signal.signal(signal.SIGUSR1, hear)
    try:
        with ThreadPoolExecutor(1) as pool, pytest.raises(Interruption):
            pool.submit(three_times, threading.get_ident())
            try:
                interruptible(work)
            finally:
                in_time = done.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert in_time


def test_after_an_interruption_no_other_item_is_begun() -> None:
    stopped, begun, main = threading.Event(), list[int](), threading.get_ident()

    def do(item: int) -> None:
        begun.append(item)
        pool.submit(interrupt_as_cog_does, main)
        stopped.wait(20)

    with ThreadPoolExecutor(1) as pool, pytest.raises(Interruption):
        in_threads(do, range(3), stopped.set, at_once=1)
    assert begun == [0]


def by_interruptible(work: Callable[[], Any]) -> None:
    interruptible(work)


def by_thread_start(work: Callable[[], Any]) -> None:
    """As Cog does with a request's files, and tqdm with its first bar."""
    patch_thread_start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def interrupted_at_birth(in_a_thread: Callable[[Callable[[], Any]], None]) -> None:
    """Before a new thread's first bytecode, which it waits for while this one has the interpreter. In CPython 3.11 it
    has its parent's number until then."""
    sys.setswitchinterval(60)
    main, start, done = threading.get_ident(), _thread.start_new_thread, list[bool]()

    def start_and_interrupt(*work: Any) -> int:
        number = start(*work)
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(Interruption)) == 1
        return number

    threading._start_new_thread = klora.interruptible.start_new_thread = start_and_interrupt
    with pytest.raises(Interruption):
        in_a_thread(lambda: done.append(True))
    threading._start_new_thread = klora.interruptible.start_new_thread = start
    in_a_thread(lambda: done.append(False))
    assert done[-1] is False


@pytest.mark.parametrize("in_a_thread", [by_interruptible, by_thread_start])
def test_an_interruption_that_comes_as_a_thread_is_born_is_heard(in_a_thread: Callable[..., None]) -> None:
    process = FORK.Process(target=interrupted_at_birth, args=(in_a_thread,))
    process.start()
    process.join(20)
    process.kill()
    assert process.exitcode == 0


def begin_to_train() -> None:
    sys.modules.pop("train", None)  # which another test may have imported
    import train  # noqa: F401


def begin_to_predict() -> None:
    from predict import Predictor

    with pytest.raises(BaseModelError):  # of a folder without bases
        Predictor().setup()


def begun(begin: Callable[[], None], folder: Path) -> None:
    os.environ["KLORA_MODELS"] = str(folder)
    threading._start_new_thread, parents = _thread.start_new_thread, list[int]()

    def start(*work: Any) -> int:
        parents.append(threading.get_ident())
        return _thread.start_new_thread(*work)

    begin()
    klora.interruptible.start_new_thread = start
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.time).result()
    assert parents
    assert threading.get_ident() not in parents


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="a newborn thread has its own number")
@pytest.mark.parametrize("begin", [begin_to_train, begin_to_predict])
def test_what_libraries_start_in_a_server_is_born_elsewhere(begin: Callable[[], None], tmp_path: Path) -> None:
    process = FORK.Process(target=begun, args=(begin, tmp_path))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def fails_to_start_once_patched() -> None:
    def start(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    patch_thread_start()
    klora.interruptible.start_new_thread = start
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threading.Thread().start()


def test_no_more_threads_is_an_error_once_thread_start_is_patched() -> None:
    process = FORK.Process(target=fails_to_start_once_patched)
    process.start()
    process.join(20)
    process.kill()
    assert process.exitcode == 0
