"""Who uses what: a pin keeps a file where it is, one at a time holds a lock, and no wait outlasts its deadline."""

import os
import threading
import time
from pathlib import Path

import pytest

from klora.cache.pins import alone, pin, seized
from klora.sources.deadline import Cancelled, Deadline
from klora.sources.download import Unreachable
from test_folder.waiting import timed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_a_pin_keeps_others_from_seizing_a_file_and_they_from_pinning_it(root: Path) -> None:
    path = root / "file"
    path.touch()
    first, second = pin(path), pin(path)
    assert first and second
    for held in (first, second):
        with seized(path) as unused:
            assert not unused
        held.close()
    with seized(path) as unused:
        assert unused
        assert pin(path) is None
    third, fourth = pin(path), pin(path)
    assert third and fourth
    del third
    with fourth, seized(path) as unused:
        assert not unused
    with seized(path) as unused:
        assert unused


def test_a_pin_that_comes_while_somebody_looks_waits_for_it(root: Path) -> None:
    looking, looked = threading.Event(), threading.Event()

    def look() -> None:
        with seized(root):
            looking.set()
            time.sleep(0.05)
        looked.set()

    threading.Thread(target=look).start()
    assert looking.wait(20)
    assert pin(root)
    assert looked.wait(20)


def test_a_file_that_was_replaced_before_it_was_locked_is_pinned_as_it_is_now(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another who fetched the same: it has not been missing."""
    path, other = root / "file", root / "other"
    path.touch()
    other.touch()
    opened = os.open

    def replaced(*arguments: object) -> int:
        descriptor = opened(*arguments)  # type: ignore[arg-type]
        if other.exists():
            other.replace(path)
        return descriptor

    monkeypatch.setattr(os, "open", replaced)
    held = pin(path)
    assert held and os.path.samestat(os.fstat(held.fileno()), path.stat())


def test_a_file_that_was_removed_before_it_was_locked_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = root / "file", os.open
    path.touch()

    def removed(*arguments: object) -> int:
        descriptor = opened(*arguments)  # type: ignore[arg-type]
        path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", removed)
    assert pin(path) is None


def test_one_at_a_time_holds_a_lock_and_its_file_goes(root: Path, deadline: Deadline) -> None:
    inside, most = 0, []

    def enter() -> None:
        nonlocal inside
        for _ in range(20):
            with alone(root / "lock", deadline):
                inside += 1
                most.append(inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 160
    assert list(root.iterdir()) == []


def test_a_wait_for_a_lock_ends_with_its_deadline_or_when_it_is_cancelled(root: Path, deadline: Deadline) -> None:
    with alone(root / "lock", deadline):
        with pytest.raises(Unreachable), Deadline(0.1) as short, alone(root / "lock", short):
            pass
        other = Deadline(20)
        threading.Timer(0.1, other.cancel).start()
        with timed(), pytest.raises(Cancelled), alone(root / "lock", other):
            pass
