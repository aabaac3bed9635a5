"""The folder of a store: whose it is, and what may be in it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from klora.cache.folder import open_folder as folder_at
from klora.errors import SourceError
from klora.sources.deadline import Deadline
from test_folder.store.stored import SIZE, opened, put, ref


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
        refusal(root) == f"The LoRA cache cannot be at {root}: File exists. Expected KLORA_CACHE to say where it can."
    )


def test_a_root_that_cannot_be_written_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K6. What root may do anywhere, a file system mounted to be read only forbids: hence a shim of mkdir."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    root.mkdir(mode=0o700)
    monkeypatch.setattr(os, "mkdir", read_only)
    assert refusal(root) == (
        f"The LoRA cache cannot be at {root}: Read-only file system. Expected KLORA_CACHE to say where it can."
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


def test_two_that_open_a_new_folder_at_once_have_one_secret(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = folder_at(root), []

    def token_bytes(count: int) -> bytes:
        made.append(count)
        time.sleep(0.1)
        return os.urandom(count)

    (root / "secret").unlink()
    monkeypatch.setattr("klora.cache.folder.secrets.token_bytes", token_bytes)
    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(lambda _: folder.secret(), range(2))}) == 1
    assert made == [32]
