"""Drafts are counted against the room from their first byte, and go when they are given up."""

import os
from pathlib import Path

import pytest

from klora.cache import draft
from klora.cache.room import CacheFullError
from klora.sources.deadline import Deadline
from test_folder.lending import safetensors
from test_folder.store.stored import SIZE, opened, put


def test_a_draft_reserves_what_it_will_need(root: Path, deadline: Deadline) -> None:
    store = opened(root, 3 * SIZE)
    with store.draft(2 * SIZE, deadline) as first:
        assert store.room.used() == opened(root, 3 * SIZE).room.used() == 2 * SIZE
        with pytest.raises(CacheFullError), store.draft(2 * SIZE, deadline):
            pass
        with store.draft(SIZE, deadline):
            assert store.room.used() == 3 * SIZE
        first.write(b"x")
    assert store.room.used() == 0
    assert list((root / "tmp").iterdir()) == []


def test_a_draft_of_unknown_size_grows_in_steps_and_is_cut_at_the_end(
    root: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "STEP", 3 * SIZE)
    store = opened(root, 6 * SIZE)
    with store.draft(None, deadline) as file:
        lengths = []
        for _ in range(4):
            file.write(b"x" * SIZE)
            lengths.append(store.room.used())
        assert lengths == [3 * SIZE] * 3 + [6 * SIZE]
        with pytest.raises(CacheFullError):
            file.write(b"x" * 3 * SIZE)
        file.finish()
        assert store.room.used() == 4 * SIZE


def test_a_draft_that_begins_again_holds_only_what_came_since(root: Path, deadline: Deadline) -> None:
    store = opened(root)
    with store.draft(SIZE, deadline) as file:
        file.write(b"a" * SIZE)
        file.restart()
        file.write(b"b" * 10)
        file.finish()
        assert file.path.read_bytes() == b"b" * 10


def test_a_write_that_the_system_does_in_parts_is_whole(
    root: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:7], at))
    with opened(root).draft(SIZE, deadline) as file:
        file.write(safetensors(SIZE))
        assert file.path.read_bytes() == safetensors(SIZE)


def test_bytes_that_the_disk_must_keep_free_stay_free(root: Path, deadline: Deadline) -> None:
    """What is promised to drafts and not written yet counts as gone: they are sparse."""
    free = os.statvfs(root.parent)
    keep = free.f_bavail * free.f_frsize - (200 << 20)
    store = opened(root, 1 << 50, keep)
    with store.draft(150 << 20, deadline), pytest.raises(CacheFullError), store.draft(150 << 20, deadline):
        pass
    with store.draft(150 << 20, deadline):
        pass


def test_what_a_process_reserved_that_is_no_more_makes_room(root: Path, deadline: Deadline) -> None:
    store = opened(root, 2 * SIZE)
    (root / "tmp" / "dead").write_bytes(bytes(2 * SIZE))
    put(store, safetensors(SIZE), deadline)
    assert not (root / "tmp" / "dead").exists()
