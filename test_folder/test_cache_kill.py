"""The cache among processes: one download for all of them, and whatever a kill -9 leaves heals.

The children are forked, so that they need not import torch again.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from klora.cache import Store
from klora.cache.draft import Draft
from klora.cache.refs import Ref
from klora.sources.deadline import Deadline
from klora.sources.download import Download
from test_folder.lending import Shop, hub, opened_shop, safetensors, sha256

SIZE = 1_000_000
FILE = safetensors(SIZE)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with opened_shop(tmp_path / "cache") as shop:
        shop.authority.has(hub("x"), ("x.safetensors", FILE))
        yield shop


@contextlib.contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """Another process that does this; killed and gone at the end of the block."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Mark:
    """A place in a child's work that the parent waits for; the child never goes beyond it."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def stop_here(self) -> None:
        os.write(self._write, b"x")
        time.sleep(60)

    def wait(self) -> None:
        assert select.select([self._read], [], [], 20)[0], "the child did not come so far"


class StoppingDraft:
    """A draft that never takes more than a share of the bytes."""

    def __init__(self, draft: Draft, share: float, mark: Mark) -> None:
        self.draft, self.most, self.mark = draft, int(SIZE * share), mark

    def write(self, data: bytes) -> None:
        self.draft.write(data[: self.most - self.draft.written])
        if self.draft.written >= self.most:
            self.mark.stop_here()

    def restart(self) -> None:
        self.draft.restart()


def stop_at_share(shop: Shop, share: float, mark: Mark) -> None:
    def fetch(download: Download, draft: Draft, deadline: Deadline) -> str:
        return Shop.fetch(shop, download, StoppingDraft(draft, share, mark), deadline)  # type: ignore[arg-type]

    shop.library._fetch = fetch


def stop_before_the_rename(shop: Shop, mark: Mark) -> None:
    shop.library._check = lambda path: mark.stop_here()


def stop_before_the_ref(shop: Shop, mark: Mark) -> None:
    def remember(ref: Ref, deadline: Deadline) -> None:
        mark.stop_here()

    shop.store.remember = remember  # type: ignore[method-assign]


STOPS: dict[str, Callable[[Shop, Mark], None]] = {
    "10 %": lambda shop, mark: stop_at_share(shop, 0.1, mark),
    "50 %": lambda shop, mark: stop_at_share(shop, 0.5, mark),
    "99 %": lambda shop, mark: stop_at_share(shop, 0.99, mark),
    "between write and rename": stop_before_the_rename,
    "between rename and ref": stop_before_the_ref,
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_cache_whose_writer_was_killed_heals_at_the_next_start(
    shop: Shop, stop: Callable[[Shop, Mark], None]
) -> None:
    """K2."""
    mark = Mark()

    def work() -> None:
        stop(shop, mark)
        shop.read(hub("x"))

    with child(work) as pid:
        mark.wait()
        assert Store(shop.root, 1 << 30, 0).room.used() == SIZE  # it is at work, and nobody takes that away
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    published = shop.names("blobs")
    shop.reopen()
    assert shop.is_clean()
    assert shop.names("refs") == []
    assert shop.names("blobs") == published
    assert shop.read(hub("x")) == FILE
    assert shop.names("blobs") == [sha256(FILE)]
    assert shop.store.room.used() == SIZE
    assert shop.origin.served.total() == (1 if published else 2)
    assert shop.is_clean()


def test_a_killed_writers_room_is_free_again_without_a_restart(shop: Shop) -> None:
    shop.max_bytes = SIZE
    shop.reopen()
    mark = Mark()

    def work() -> None:
        stop_at_share(shop, 0.5, mark)
        shop.read(hub("x"))

    with child(work):
        mark.wait()
    assert shop.store.room.used() == SIZE
    assert shop.read(hub("x")) == FILE


def test_who_waits_for_a_killed_process_goes_on(shop: Shop) -> None:
    """K12."""
    mark = Mark()

    def work() -> None:
        stop_at_share(shop, 0.5, mark)
        shop.read(hub("x"))

    with ThreadPoolExecutor(1) as pool:
        with child(work):
            mark.wait()
            waiting = pool.submit(shop.read, hub("x"))
            time.sleep(0.2)
            assert not waiting.done()
        assert waiting.result(10) == FILE


def test_what_another_process_has_in_use_is_not_evicted(shop: Shop) -> None:
    """K4."""
    shop.max_bytes = SIZE * 3 // 2
    shop.authority.has(hub("y"), ("y.safetensors", safetensors(SIZE, 1)))
    shop.reopen()
    mark = Mark()

    def work() -> None:
        with shop.borrowed(20, {}, lora=hub("x")):
            mark.stop_here()

    with child(work):
        mark.wait()
        with pytest.raises(ValueError, match="cache is full"):
            shop.read(hub("y"))
        assert shop.names("blobs") == [sha256(FILE)]
    assert shop.read(hub("y")) == safetensors(SIZE, 1)


@pytest.mark.parametrize("tokens", [{}, {"hf": "t"}], ids=["public", "own"])
def test_four_processes_of_fifty_threads_fetch_one_file_once(shop: Shop, tokens: dict[str, str]) -> None:
    """K1."""
    shop.authority.has(hub("x"), ("x.safetensors", FILE), sha256=None)
    shop.origin.pause = lambda path: time.sleep(0.2)
    (shop.root / "secret").unlink()  # so that they make it at once, too
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(4), context.Queue()

    def work() -> None:
        together.wait(20)
        shop.reopen()
        with ThreadPoolExecutor(50) as pool:
            same = all(pool.map(lambda _: shop.read(hub("x"), 60, **tokens) == FILE, range(50)))
        results.put((same, shop.authority.asked.total()))

    workers = [context.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(10)
    assert [same for same, _ in answers] == [True] * 4
    assert sum(asked for _, asked in answers) == 1
    assert shop.origin.served.total() == 1
    assert shop.is_clean()
