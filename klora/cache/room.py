"""The bounds of the cache: how much lies in it, and what goes when more is to come.

Every draft is as long as what it reserves, so the lengths of the files are the whole account, for all processes.
Whoever makes room must hold the lock SPACE. Knows nothing of what is in the files.
"""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from klora.cache.folder import Folder
from klora.cache.pins import alone, seized
from klora.cache.refs import Refs
from klora.errors import SourceError
from klora.sources.deadline import Deadline

SPACE = "space"
MAX_REFS = 10_000
MAX_QUARANTINED = 8
ORPHAN = 3600.0  # seconds: older blobs without a ref go at the start


class CacheFullError(SourceError):
    """Raised when what is in use leaves no room for a file."""


class Entry(NamedTuple):
    """A file of the cache. size: its length in bytes; unwritten: how many of them the disk has not given yet."""

    path: Path
    size: int
    unwritten: int
    modified: float


class Shortage(NamedTuple):
    """How many bytes too many there would be: for the cache's bound, for the disk. 0 or less: it fits."""

    cache: int
    disk: int


class Room:
    """How many bytes the cache may have, and how many the disk must keep."""

    def __init__(self, folder: Folder, refs: Refs, max_bytes: int, min_free: int) -> None:
        self._folder, self._refs, self._max_bytes, self._min_free = folder, refs, max_bytes, min_free

    def used(self) -> int:
        """The bytes of blobs and their scores, of drafts with what they reserve, and of what is in quarantine."""
        return sum(entry.size for entry in self._all())

    def make(self, wanted: int) -> None:
        """See that so many bytes more fit: what was used longest ago goes, unless in use. Raises CacheFullError."""
        if max(self._shortage(wanted)) <= 0:
            return
        if wanted > self._max_bytes:
            raise CacheFullError(
                f"{wanted} bytes were asked for, and the whole LoRA cache holds {self._max_bytes}. "
                "Expected a smaller file, or a larger cache."
            )
        self._sweep_drafts()
        shortage = self._shortage(wanted)
        spare = sum(entry.size for entry in self._spare(self._refs.by_blob()))
        if shortage.disk > max(shortage.cache, spare):
            raise CacheFullError(
                f"The disk of the LoRA cache is full: {wanted} bytes more were asked for, and of its "
                f"{self._folder.free_bytes()} free bytes {self._min_free} are to stay so. "
                f"Expected {shortage.disk - spare} more of them, or a smaller file."
            )
        if shortage.cache > spare:
            available = max(0, wanted - shortage.cache + spare)
            raise CacheFullError(
                f"The LoRA cache is full: {wanted} bytes more were asked for, and {available} of its {self._max_bytes} "
                "can be had beside the files in use. Expected a smaller file, a larger cache, or, where other requests "
                "use them, another try when these have ended."
            )
        self.evict(max(shortage))
        if (left := max(self._shortage(wanted))) > 0:  # a file came into use meanwhile, or the disk gave less back
            raise CacheFullError(
                f"The LoRA cache is full: {wanted} bytes more were asked for, {left} of them too many. "
                "Expected a smaller file, or another try a little later."
            )

    def evict(self, wanted: int) -> int:
        """Remove what is not in use, the longest unused first, up to so many bytes. Returns how many they were."""
        gone, refs = 0, self._refs.by_blob()
        for entry in self._spare(refs):
            if gone >= wanted:
                break
            with seized(entry.path) as unused:
                if unused or entry.path.parent == self._folder.quarantine:
                    for name in refs.get(entry.path.name, ()):
                        self._refs.forget(name)
                    gone += entry.size + self._remove_scores(entry.path.name)
                    remove(entry.path)
        return gone

    def _remove_scores(self, blob: str) -> int:
        """Remove the scores of a blob, alone or with others. Returns how many bytes they were."""
        scores = [entry for entry in files(self._folder.scores) if blob in entry.path.name]
        for entry in scores:
            remove(entry.path)
        return sum(entry.size for entry in scores)

    def sweep(self) -> None:
        """Clear away what killed processes and damage left: at the start, beside others that are at work."""
        self._sweep_drafts()
        for lock in self._folder.locks.iterdir():
            if lock.name != SPACE:
                with contextlib.suppress(SourceError), alone(lock, Deadline(0.05)):  # taken and released, it is gone
                    pass
        self._sweep_refs()

    def thin_refs(self) -> None:
        """Keep the number of refs bounded: small files under many names would outnumber all bytes."""
        if len(self._refs.names()) > MAX_REFS:
            for name in sorted(self._refs.names(), key=self._refs.last_use)[: MAX_REFS // 10]:
                self._refs.forget(name)
            self._sweep_refs()

    def _sweep_drafts(self) -> None:
        """Remove the drafts and the loans of processes that are no more."""
        for path in list(self._folder.drafts.iterdir()):
            with seized(path) as unused:
                if unused:
                    remove(path)

    def _sweep_refs(self) -> None:
        """Remove refs that are damaged or lack a blob, and blobs that no ref has named for a while."""
        blobs, refs = list(files(self._folder.blobs)), self._refs.by_blob()
        here = {blob.path.name for blob in blobs}
        broken = {name for blob, names in refs.items() if blob not in here for name in names}
        for name in set(self._refs.names()) - (set().union(*refs.values()) - broken):
            self._refs.forget(name)
        for scores in self._folder.scores.iterdir():
            if not set(scores.stem.split("-")) <= here:
                remove(scores)
        for blob in blobs:
            # A young one is about to get its ref; by a clock put back, what was old may seem to be of the future.
            if blob.path.name not in refs and abs(time.time() - blob.modified) > ORPHAN:
                with seized(blob.path) as unused:
                    if unused:
                        remove(blob.path)

    def _all(self) -> Iterator[Entry]:
        for place in (self._folder.blobs, self._folder.scores, self._folder.drafts, self._folder.quarantine):
            yield from files(place)

    def _shortage(self, wanted: int) -> Shortage:
        """What is lacking for so many bytes more."""
        entries = list(self._all())
        over = sum(entry.size for entry in entries) + wanted - self._max_bytes
        promised = sum(entry.unwritten for entry in entries)
        return Shortage(over, wanted + promised + self._min_free - self._folder.free_bytes())

    def _spare(self, refs: dict[str, set[str]]) -> Iterator[Entry]:
        """What may be evicted, in this order: quarantine, blobs without a ref, then the longest unused."""
        yield from files(self._folder.quarantine)
        used = {blob: max(map(self._refs.last_use, names)) for blob, names in refs.items()}
        for entry in sorted(files(self._folder.blobs), key=lambda entry: used.get(entry.path.name, 0.0)):
            with seized(entry.path) as unused:
                pass
            if unused:
                yield entry


def files(folder: Path) -> Iterator[Entry]:
    """The regular files in a folder, in no order; what goes meanwhile is left out."""
    for path in list(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                unwritten = max(0, status.st_size - status.st_blocks * 512)
                yield Entry(path, status.st_size, unwritten, status.st_mtime)


def remove(path: Path) -> None:
    """Whatever it is; also if it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, quarantine: Path) -> None:
    """Move what lies in a blob's place into quarantine, where the newest few are kept to be looked at."""
    with contextlib.suppress(FileNotFoundError):  # another process did it first
        path.rename(quarantine / f"{path.name}.{os.urandom(4).hex()}")
        for old in sorted(quarantine.iterdir(), key=lambda one: one.lstat().st_ctime)[:-MAX_QUARANTINED]:
            remove(old)
