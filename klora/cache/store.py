"""Files by their sha256 in a folder of bounded size, shared by processes. Knows nothing of references and of tokens.

A blob appears whole or not at all, is verified at its first use in a process, and stays while it is pinned.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from klora.cache.draft import Draft, disk_errors
from klora.cache.folder import open_folder, sync
from klora.cache.pins import Pin, alone, pin
from klora.cache.refs import SHA256, File, Ref, Refs
from klora.cache.room import SPACE, Room, set_aside
from klora.sources.deadline import Deadline
from klora.sources.download import Unreachable

_PATIENCE = 10.0  # seconds to wait at the start for a chance to clear away
_Fingerprint = tuple[int, int, int]
"""(inode, size, time of its last change): while these are the same, so is the file's content."""


class Loan(NamedTuple):
    """Files under their own names in a folder of their own, until closed."""

    paths: tuple[Path, ...]
    stack: ExitStack

    def close(self) -> None:
        """Give them back."""
        self.stack.close()


class Store:
    """The disk. max_bytes: of all its files together; min_free: bytes that the disk keeps for others.

    Raises SourceError where the root could be meddled with or cannot be written.
    """

    def __init__(self, root: Path, max_bytes: int, min_free: int) -> None:
        self._folder = open_folder(root)
        self.refs = Refs(self._folder.refs)
        self.room = Room(self._folder, self.refs, max_bytes, min_free)
        self._verified: dict[str, _Fingerprint] = {}
        # Threads that want one blob wait for the first to verify it; by the first digit, so that other blobs do not.
        self._verifying = {digit: threading.Lock() for digit in "0123456789abcdef"}
        with contextlib.suppress(Unreachable), self._space(Deadline(_PATIENCE)):
            self.room.sweep()

    def secret(self) -> bytes:
        """The key of scopes' hashes: 32 bytes that never leave the folder."""
        return self._folder.secret()

    def flight(self, name: str, deadline: Deadline) -> AbstractContextManager[None]:
        """Be the only one, of all threads and processes, in the block of this name: who else enters it waits."""
        return alone(self._folder.locks / name, deadline, pause=0.05)  # fifty may wait for as long as a download takes

    # Reading.

    @disk_errors()
    def blob(self, sha256: str) -> Pin | None:
        """The blob, pinned and whole; None where there is none. What is damaged goes into quarantine."""
        if not SHA256.fullmatch(sha256):  # an authority's word, which must not become a path
            return None
        path = self._folder.blobs / sha256
        try:
            regular = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            return None
        if regular:
            if (held := pin(path)) is None:
                return None
            if self._is_whole(sha256, held):
                return held
            held.close()
        set_aside(path, self._folder.quarantine)
        return None

    def lend(self, files: Sequence[File]) -> Loan | None:
        """The files, pinned and under their names; None if one is missing or damaged."""
        with disk_errors(), ExitStack() as stack:
            for file in files:
                if (held := self.blob(file.sha256)) is None:
                    return None
                stack.enter_context(held)
            folder = stack.enter_context(self._own_folder())
            paths = tuple(folder / file.name for file in files)
            try:
                for file, path in zip(files, paths, strict=True):
                    path.hardlink_to(self._folder.blobs / file.sha256)
            except FileNotFoundError:  # somebody has just put it into quarantine
                return None
            return Loan(paths, stack.pop_all())

    def scores(self, files: Sequence[File]) -> Path:
        """The path at which the scores of these files are stored; they are removed with the files."""
        return self._folder.scores / f"{'-'.join(file.sha256 for file in files)}.json"

    @contextmanager
    def _own_folder(self) -> Iterator[Path]:
        """A new folder, pinned so that nobody takes it for a dead process's."""
        held = None
        while held is None:  # swept away before it was pinned
            folder = self._folder.drafts / uuid4().hex
            folder.mkdir(mode=0o700)
            held = pin(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            held.close()

    def _is_whole(self, sha256: str, held: Pin) -> bool:
        """Whether its bytes are those of its name: read at its first use, and again if its fingerprint changes."""
        if self._verified.get(sha256) == (fingerprint := _fingerprint(held)):
            return True
        with self._verifying[sha256[0]], contextlib.suppress(OSError):
            if self._verified.get(sha256) == fingerprint:
                return True
            with os.fdopen(held.fileno(), "rb", buffering=0, closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    self._verified[sha256] = fingerprint
                    return True
        return False

    # Writing.

    @contextmanager
    def draft(self, size: int | None, deadline: Deadline) -> Iterator[Draft]:
        """A file to write to, gone at the end of the block. size: bytes to reserve, if known. Raises CacheFullError."""
        with self._new_file(deadline) as (path, held):

            def reserve(draft: Draft, length: int) -> None:
                with self._space(deadline):
                    self.room.make(length - draft.reserved)
                    os.ftruncate(held.fileno(), length)
                    draft.reserved = length

            draft = Draft(path, held, reserve)
            if size:
                reserve(draft, size)
            yield draft

    def publish(self, draft: Draft, sha256: str, deadline: Deadline) -> Pin:
        """Make a finished draft the blob of this sha256, and pin it. The draft's own pin keeps it until then."""
        blob = self._folder.blobs / sha256
        with self._space(deadline):  # so that nobody evicts the old one by the name of the new one
            if blob.is_symlink() or (blob.exists() and not blob.is_file()):
                set_aside(blob, self._folder.quarantine)
            draft.path.replace(blob)
            sync(self._folder.blobs)
            held = pin(blob)
        assert held is not None, "nobody removes what the draft pins"
        self._verified[sha256] = _fingerprint(held)
        return held

    def remember(self, ref: Ref, deadline: Deadline) -> None:
        """Write a ref. Its blobs must be pinned, or it may name what is gone."""
        with self._new_file(deadline) as (path, held), disk_errors():
            draft = Draft(path, held, lambda draft, length: None)  # so short that nothing need make room for it
            draft.write(ref.json())
            draft.finish()
            path.replace(self.refs.path(ref.name))
            try:
                sync(self._folder.refs)
            except OSError:
                self.refs.forget(ref.name)  # or a request that fails leaves one behind
                raise
        with self._space(deadline):
            self.room.thin_refs()

    @contextmanager
    def _new_file(self, deadline: Deadline) -> Iterator[tuple[Path, Pin]]:
        """An empty file among the drafts, pinned, gone at the end of the block unless it was moved."""
        path = self._folder.drafts / uuid4().hex
        try:
            with self._space(deadline):  # or somebody may sweep it away before it is pinned
                held = pin(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            assert held is not None, "nobody else has its name"
            with held:
                yield path, held
        finally:
            path.unlink(missing_ok=True)

    def evict(self, wanted: int, deadline: Deadline) -> int:
        """Remove at least wanted bytes of what is not in use, if there are as many. Returns how many went."""
        with self._space(deadline):
            return self.room.evict(wanted)

    @contextmanager
    def _space(self, deadline: Deadline) -> Iterator[None]:
        """Hold the lock under which room is reserved, and files appear and go. Raises DiskError."""
        with disk_errors(), alone(self._folder.locks / SPACE, deadline):
            yield


def _fingerprint(held: Pin) -> _Fingerprint:
    status = os.fstat(held.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
