"""Blobs are kept by their hash, lent, and let go least recently used first."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from klora.cache import room
from klora.cache.draft import DiskError
from klora.sources.deadline import Deadline
from test_folder.lending import sha256
from test_folder.store.stored import SIZE, blobs, opened, put, ref


def test_a_lent_file_stays_as_it_is_whatever_becomes_of_its_blob(root: Path, deadline: Deadline) -> None:
    store = opened(root)
    blob = put(store, b"x" * SIZE, deadline)
    loan = store.lend(ref("r", b"x" * SIZE).files)
    assert loan
    (root / "blobs" / blob).unlink()
    assert loan.paths[0].read_bytes() == b"x" * SIZE
    loan.close()
    assert list((root / "tmp").iterdir()) == []


@pytest.mark.parametrize("missing", [0, 1])
def test_all_files_are_lent_or_none(root: Path, deadline: Deadline, missing: int) -> None:
    store, files = opened(root), (b"a" * SIZE, b"b" * SIZE)
    put(store, files[1 - missing], deadline)
    assert store.lend(ref("r", *files).files) is None
    assert list((root / "tmp").iterdir()) == []
    assert store.evict(1, deadline) == SIZE


def test_a_blob_is_read_at_its_first_use_only(root: Path, deadline: Deadline) -> None:
    """A change that keeps inode, length and time shows only in another process."""
    store = opened(root)
    blob = put(store, b"x" * SIZE, deadline)
    path = root / "blobs" / blob
    status = path.stat()
    path.chmod(0o600)
    path.write_bytes(b"y" * SIZE)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.blob(blob)
    assert opened(root).blob(blob) is None
    assert [path.name.partition(".")[0] for path in (root / "quarantine").iterdir()] == [blob]


def test_threads_that_want_one_blob_verify_it_once(
    root: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = put(opened(root), b"x" * SIZE, deadline)
    store, reads, whole = opened(root), [], hashlib.file_digest

    def slow(*arguments: object) -> object:
        reads.append(arguments)
        time.sleep(0.05)
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", slow)
    threads = [threading.Thread(target=store.blob, args=(blob,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1


def test_quarantine_is_bounded_and_goes_first(root: Path, deadline: Deadline) -> None:
    store = opened(root, 20 * SIZE)
    for n in range(room.MAX_QUARANTINED + 3):
        blob = put(store, bytes([n]) * SIZE, deadline)
        (root / "blobs" / blob).chmod(0o600)
        os.truncate(root / "blobs" / blob, SIZE - 1)
        assert store.blob(blob) is None
    assert len(list((root / "quarantine").iterdir())) == room.MAX_QUARANTINED
    assert store.room.used() == room.MAX_QUARANTINED * (SIZE - 1)
    kept = put(store, b"k" * SIZE, deadline, "r")
    with store.draft(19 * SIZE, deadline):
        assert list((root / "quarantine").iterdir()) == []
        assert blobs(root) == {kept}


def test_what_the_disk_refuses_is_a_sentence_wherever_it_does(root: Path, deadline: Deadline) -> None:
    store = opened(root)
    blob = put(store, b"x" * SIZE, deadline)
    os.truncate(root / "blobs" / blob, SIZE - 1)
    for name in ("quarantine", "locks"):
        (root / name).rmdir()
        (root / name).touch()
    for refused in (lambda: store.blob(blob), lambda: store.evict(1, deadline)):
        with pytest.raises(DiskError, match=r"^The LoRA cache cannot be written: "):
            refused()


def test_a_blob_goes_with_every_ref_that_names_it(root: Path, deadline: Deadline) -> None:
    store = opened(root)
    put(store, b"a" * SIZE, deadline, "one")
    put(store, b"a" * SIZE, deadline, "two")
    put(store, b"b" * SIZE, deadline, "three")
    for name in ("one", "two"):
        os.utime(store.refs.path(ref(name, b"").name), (1, 1))
    assert store.evict(1, deadline) == SIZE
    assert store.refs.names() == [ref("three", b"").name]


def test_the_last_use_of_a_blob_is_that_of_its_youngest_ref(root: Path, deadline: Deadline) -> None:
    store = opened(root)
    for name, data, used in (("a", b"a", 1), ("b", b"b", 2), ("c", b"a", 3)):
        put(store, data * SIZE, deadline, name)
        os.utime(store.refs.path(ref(name, b"").name), (used, used))
    store.evict(1, deadline)
    assert blobs(root) == {sha256(b"a" * SIZE)}
