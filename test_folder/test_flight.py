"""Who wants the same at once waits for one, who is cancelled ends at once, and the first failure ends all."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from klora.sources.deadline import Cancelled, Deadline
from klora.sources.download import NotFound, Unreachable
from test_folder.lending import CONTENT, STYLE, Shop, hub
from test_folder.waiting import timed


def test_fifty_threads_fetch_one_file_once(shop: Shop) -> None:
    """K1; the processes are in test_cache_kill.py."""
    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(lambda _: shop.read(hub("content")), range(50))) == {CONTENT}
    assert shop.origin.served.total() == shop.authority.asked.total() == 1


def test_those_who_wait_share_a_refusal(shop: Shop) -> None:
    def refusal(_: int) -> str:
        with pytest.raises(NotFound) as error:
            shop.read(hub("missing"))
        return str(error.value)

    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(refusal, range(20)))) == 1
    assert shop.authority.asked.total() == 1


def waiting_for_the_body(shop: Shop) -> tuple[threading.Event, threading.Event]:
    """(set when a body is half sent, to be set for it to go on); from then on no body waits."""
    half, go_on = threading.Event(), threading.Event()

    def pause(path: str) -> None:
        half.set()
        go_on.wait(20)

    shop.origin.pause = pause
    return half, go_on


def test_who_waits_for_another_waits_no_longer_than_its_own_deadline(shop: Shop) -> None:
    half, go_on = waiting_for_the_body(shop)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shop.read, hub("content"))
        assert half.wait(10)
        with timed(0.25), pytest.raises(Unreachable):
            shop.read(hub("content"), seconds=0.3)
        go_on.set()
        assert first.result() == CONTENT


class Cancellation(BaseException):
    """As Cog raises it in whatever the main thread does."""


@pytest.mark.parametrize("waits", [False, True], ids=["fetching", "waiting for another"])
def test_a_cancelled_request_ends_at_once_and_leaves_nothing_behind(shop: Shop, waits: bool) -> None:
    """K10."""
    half, go_on = waiting_for_the_body(shop)
    other = threading.Thread(target=lambda: shop.read(hub("content")))
    if waits:
        other.start()
        half.wait(10)

    def cancel(*_: object) -> None:
        raise Cancellation

    before = signal.signal(signal.SIGUSR1, cancel)
    threading.Thread(target=lambda: (half.wait(10), time.sleep(0.2), os.kill(os.getpid(), signal.SIGUSR1))).start()
    try:
        with timed(), pytest.raises(Cancellation), shop.borrowed(20, {}, a=hub("content"), b=hub("style")):
            pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    if not waits:
        assert shop.is_clean()
    go_on.set()
    with timed():
        if waits:
            other.join()
        assert shop.read(hub("content")) == CONTENT
        assert shop.read(hub("style")) == STYLE
    assert shop.is_clean()


def test_a_cancelled_download_is_no_refusal_for_those_who_waited(shop: Shop) -> None:
    half, go_on = waiting_for_the_body(shop)
    deadline = Deadline(20)
    with ThreadPoolExecutor(2) as pool:

        def first() -> None:
            with shop.library.borrowed({"lora": hub("content")}, {}, deadline):
                pass

        cancelled = pool.submit(first)
        assert half.wait(10)
        second = pool.submit(shop.read, hub("content"))
        time.sleep(0.1)
        deadline.cancel()
        go_on.set()
        with pytest.raises(Cancelled):
            cancelled.result()
        assert second.result() == CONTENT


def test_the_first_failure_ends_the_other_download(shop: Shop) -> None:
    _, go_on = waiting_for_the_body(shop)
    missing = {"content_lora": hub("content"), "style_lora": hub("missing")}
    with timed(), pytest.raises(NotFound), shop.borrowed(20, {}, **missing):
        pass
    assert shop.is_clean()
    go_on.set()
