"""The cache's disk: whose it must be, what is reserved, pinned, evicted, verified and cleared away."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from klora.cache import CacheFullError, Store, draft, room
from klora.cache.refs import File, Moment, Ref
from klora.errors import SourceError
from klora.sources.deadline import Deadline
from test_folder.lending import ROOMY, safetensors, sha256

SIZE = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    with Deadline(20) as deadline:
        yield deadline


def opened(root: Path, max_bytes: int = ROOMY, min_free: int = 0) -> Store:
    return Store(root, max_bytes, min_free)


def put(store: Store, data: bytes, deadline: Deadline, name: str | None = None) -> str:
    """Publish a blob, with a ref of this name if it has one; its sha256."""
    with store.draft(len(data), deadline) as file:
        file.write(data)
        file.finish()
        with store.publish(file, sha256(data), deadline):
            if name:
                store.remember(ref(name, data), deadline)
    return sha256(data)


def ref(name: str, *files: bytes) -> Ref:
    return Ref(name, "public", tuple(File("k", f"{n}.x", sha256(f), len(f)) for n, f in enumerate(files)), Moment.now())


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").iterdir()}


# The root.


def test_all_of_it_is_for_its_owner_alone(root: Path, deadline: Deadline) -> None:
    blob = put(opened(root), b"x" * SIZE, deadline, "r")
    modes = {path.relative_to(root).as_posix(): path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}
    folders = dict.fromkeys((".", "blobs", "refs", "scores", "tmp", "locks", "quarantine"), 0o700)
    assert modes == folders | {"secret": 0o600, f"blobs/{blob}": 0o400, f"refs/{ref('r', b'').name}.json": 0o400}


def refusal(root: Path) -> str:
    with pytest.raises(SourceError) as error:
        opened(root)
    return str(error.value)


@pytest.mark.parametrize("room", ["", "blobs", "tmp"])
def test_a_link_in_the_place_of_a_folder_is_refused(root: Path, room: str) -> None:
    """K6."""
    opened(root)
    (root / room).rename(root.parent / "elsewhere")
    (root / room).symlink_to(root.parent / "elsewhere")
    assert refusal(root) == (
        f"The LoRA cache cannot be at {root / room}, which is a symbolic link. "
        f"Expected a folder of user {os.geteuid()} that nobody else may write, mode 0700."
    )


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(root: Path, mode: int) -> None:
    """K6."""
    root.mkdir()
    root.chmod(mode)
    assert f"which is writable by others (mode {mode:o})" in refusal(root)
    assert list(root.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K6."""
    owner = os.geteuid()
    opened(root)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert f"which is owned by user {owner}. Expected a folder of user {owner + 1} " in refusal(root)


def test_a_file_is_no_root(root: Path) -> None:
    root.write_text("x")
    assert (
        refusal(root)
        == f"The LoRA cache cannot be at {root}: File exists. Expected a folder that the server may write."
    )


def test_a_root_that_cannot_be_written_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K6. What root may do anywhere, a file system mounted to be read only forbids: hence a shim of mkdir."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    root.mkdir(mode=0o700)
    monkeypatch.setattr(os, "mkdir", read_only)
    assert refusal(root) == (
        f"The LoRA cache cannot be at {root}: Read-only file system. Expected a folder that the server may write."
    )


def test_the_secret_stays_and_one_that_is_damaged_or_seen_by_others_is_made_anew(root: Path) -> None:
    secret = opened(root).secret()
    assert len(secret) == 32
    assert opened(root).secret() == secret
    for damage in (lambda path: path.chmod(0o640), lambda path: path.write_bytes(b"short"), Path.unlink):
        damage(root / "secret")
        new = opened(root).secret()
        assert len(new) == 32 and new != secret
        assert (root / "secret").stat().st_mode & 0o777 == 0o600
        secret = new


# Drafts.


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
    store = opened(root, 10 * SIZE)
    with store.draft(None, deadline) as file:
        lengths = []
        for _ in range(4):
            file.write(b"x" * SIZE)
            lengths.append(store.room.used())
        assert lengths == [3 * SIZE] * 3 + [6 * SIZE]
        file.finish()
        assert store.room.used() == 4 * SIZE
        file.write(b"x" * 2 * SIZE)
        with pytest.raises(CacheFullError):
            file.write(b"x" * 5 * SIZE)


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


# Blobs.


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


# After a restart.


def test_a_start_clears_away_what_nobody_holds_and_nothing_else(root: Path, deadline: Deadline) -> None:
    store = opened(root)
    blob = put(store, b"a" * SIZE, deadline, "kept")
    orphan, young = put(store, b"o" * SIZE, deadline), put(store, b"y" * SIZE, deadline)
    held = put(store, b"h" * SIZE, deadline)
    for path in (orphan, held):
        os.utime(root / "blobs" / path, (1, 1))
    (root / "tmp" / "dead").write_bytes(b"x" * SIZE)
    (root / "tmp" / "loan").mkdir()
    (root / "tmp" / "loan" / "a.safetensors").hardlink_to(root / "blobs" / blob)
    (root / "locks" / "dead").touch()
    (root / "refs" / "damaged.json").write_text("{")
    store.remember(ref("lacking", b"l"), deadline)
    loan = store.lend(ref("kept", b"a" * SIZE).files)
    with contextlib.ExitStack() as use:
        assert loan
        use.callback(loan.close)
        pinned = store.blob(held)
        assert pinned
        use.enter_context(pinned)
        file = use.enter_context(store.draft(SIZE, deadline))
        use.enter_context(store.flight("flight", deadline))
        again = opened(root)
        assert blobs(root) == {blob, young, held}
        assert {path.name for path in (root / "tmp").iterdir()} == {file.path.name, loan.paths[0].parent.name}
        assert [path.name for path in (root / "locks").iterdir()] == ["flight"]
        assert again.refs.names() == [ref("kept", b"").name]
        assert loan.paths[0].exists()


def test_an_orphan_of_the_future_goes_too(root: Path, deadline: Deadline) -> None:
    """K7."""
    orphan = put(opened(root), b"o" * SIZE, deadline)
    os.utime(root / "blobs" / orphan, (time.time() + 1e6,) * 2)
    opened(root)
    assert blobs(root) == set()


def test_the_number_of_refs_is_bounded(root: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_REFS", 20)
    store = opened(root)
    for n in range(23):
        put(store, bytes([n]) * SIZE, deadline, str(n))
        os.utime(store.refs.path(ref(str(n), b"").name), (n + 1, n + 1))
        os.utime(root / "blobs" / sha256(bytes([n]) * SIZE), (1, 1))
    names = {ref(str(n), b"").name for n in range(4, 23)}
    assert set(store.refs.names()) == names
    assert blobs(root) == {sha256(bytes([n]) * SIZE) for n in range(4, 23)}
