"""What is found on the disk after a restart."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from klora.cache import room
from klora.sources.deadline import Deadline
from test_folder.lending import sha256
from test_folder.store.stored import SIZE, blobs, opened, put, ref


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
