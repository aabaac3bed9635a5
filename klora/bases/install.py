"""Fetches what a folder lacks of a base model. Every file is there whole, or not at all.

In the base's folder, .cache/klora/state says of which commits its files are, and whether they are all there.  The
index, by which others know that a base is installed, comes last.
"""

import hashlib
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from klora.bases.hub import File, Repository, in_words
from klora.bases.pget import Pget, PgetError
from klora.bases.table import INDICES, Base
from klora.errors import BaseModelError
from klora.interruptible import in_threads

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
AT_ONCE = 4  # files


def ensure_base(
    name: str,
    base: Base,
    folder: Path,
    token: str | None = None,
    pget: Pget | None = None,
    *,
    endpoint: str | None = None,
) -> Path:
    """Fetch what folder/name lacks of a base, from all its sources, and return that folder. Raises BaseModelError.

    The hub is asked which files there are, each time.  token: of somebody who has accepted the licence.  pget: fetches
    the large files of public repositories where no token is given; what it fails at the hub's client fetches.
    Processes that want the same base at once wait for each other.
    """
    return listed(name, base, folder, token, endpoint=endpoint).install(pget)


def listed(name: str, base: Base, folder: Path, token: str | None = None, *, endpoint: str | None = None) -> "Listing":
    """What the hub has of a base, for folder/name. Nothing is written. Raises BaseModelError."""
    target = folder / name
    sources = [_source(name, Repository(part, token, endpoint), target) for part in base.sources]
    return Listing(base, name, target, sources)


@dataclass(frozen=True)
class Source:
    """The files that a base takes from a repository."""

    repository: Repository
    files: Sequence[File]

    def __str__(self) -> str:
        return f"{self.repository.base.repository} at {self.repository.base.revision}"


def _source(name: str, repository: Repository, target: Path) -> Source:
    """What a repository has of a base. Raises BaseModelError where that is nothing, or has no index and should."""
    base = repository.base
    with in_words(name, repository, target):
        files = repository.wanted()
    if not any(base.completed_by or file.path in INDICES for file in files):
        expected = " and ".join(base.files) if base.completed_by else "a diffusers folder"
        raise BaseModelError(f"{base.repository} at {base.revision} holds nothing of {name}. Expected {expected}.")
    return Source(repository, files)


@dataclass(frozen=True)
class Listing:
    """The files of a base at one commit of each of its sources, and the folder that is to have them."""

    base: Base
    name: str
    target: Path
    sources: Sequence[Source]

    @property
    def files(self) -> list[File]:
        """Of all sources."""
        return [file for source in self.sources for file in source.files]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes of those that are not there, by their sizes."""
        return sum(file.size for file in self.files if not _has_size(self.target / file.path, file.size))

    def distrust(self) -> None:
        """Let the next install() check every byte, not only sizes."""
        _state_file(self.target).unlink(missing_ok=True)

    def install(self, pget: Pget | None = None) -> Path:
        """Fetch what is missing, as ensure_base() does, and take away a build's note that it is. Raises
        BaseModelError."""
        with in_words(self.name, self.sources[0].repository, self.target):
            if not self._is_complete():
                self.target.mkdir(parents=True, exist_ok=True)
                with FileLock(self.target.with_name(f".{self.name}.lock")):
                    if not self._is_complete():  # another process may have fetched it meanwhile
                        _Installation(self.name, self.target, self.sources, pget).complete()
            left_to_setup(self.target.parent, self.name).unlink(missing_ok=True)
        return self.target

    def _is_complete(self) -> bool:
        """Whether all files were checked when they came, and are still there by their sizes."""
        return _state(self.target) == f"{_commits(self.sources)} complete" and self.missing == 0


def check_room(names: Sequence[str], folder: Path, needed: int) -> None:
    """Raise BaseModelError unless the disk of a folder, which need not be there yet, has so many bytes free."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise BaseModelError(
            f"{' and '.join(names)} {'needs' if len(names) == 1 else 'need'} {needed / 1e9:.1f} GB more in {folder}, "
            f"where {free / 1e9:.1f} GB are free. Expected a disk with room for its files."
        )


def left_to_setup(folder: Path, name: str) -> Path:
    """Where a build leaves a note that it has not fetched a base, so that set-up has to."""
    return folder / f"{name}.at-setup"


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _commits(sources: Sequence[Source]) -> str:
    return " ".join(source.repository.base.revision for source in sources)


def _state_file(target: Path) -> Path:
    return target / ".cache" / "klora" / "state"


def _state(target: Path) -> str:
    try:
        return _state_file(target).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""


@dataclass(frozen=True)
class _Installation:
    """One base on its way to one folder, whose lock is held."""

    name: str
    target: Path
    sources: Sequence[Source]
    pget: Pget | None
    _stop: threading.Event = field(default_factory=threading.Event)

    def complete(self) -> None:
        """Fetch the files that are missing or are not as the hub has them, those of the last source last."""
        self._begin()
        missing = [replace(source, files=self._missing(source.files)) for source in self.sources]
        self._announce(missing)
        for source in missing:
            with in_words(self.name, source.repository, self.target):
                fetch = partial(self._fetch, source)
                self._in_parallel(fetch, [file for file in source.files if file.path not in INDICES])
                self._in_parallel(fetch, [file for file in source.files if file.path in INDICES])
        self._set_state("complete")

    def _begin(self) -> None:
        """Clear away what killed processes left, and small files that nothing says are of these commits."""
        for left in (self.target / ".cache").rglob("*.incomplete"):
            left.unlink(missing_ok=True)
        if _state(self.target).rpartition(" ")[0] != _commits(self.sources):
            for file in (file for source in self.sources for file in source.files if file.sha256 is None):
                (self.target / file.path).unlink(missing_ok=True)
        self._set_state("begun")

    def _set_state(self, word: str) -> None:
        state = _state_file(self.target)
        state.parent.mkdir(parents=True, exist_ok=True)
        new = state.with_suffix(".new")
        new.write_text(f"{_commits(self.sources)} {word}")
        new.replace(state)

    def _missing(self, files: Sequence[File]) -> list[File]:
        found = self._in_parallel(self._is_there, files)
        return [file for file, there in zip(files, found, strict=True) if not there]

    def _is_there(self, file: File) -> bool:
        path = self.target / file.path
        return _has_size(path, file.size) and file.sha256 in (None, _sha256(path))

    def _announce(self, missing: Sequence[Source]) -> None:
        """Say what will be fetched. Raises BaseModelError where there is no room for it."""
        sizes = [file.size for source in missing for file in source.files]
        check_room([self.name], self.target, sum(sizes))
        of, where = sum(len(source.files) for source in self.sources), " and ".join(map(str, self.sources))
        logger.info(
            "%s: %d of %d files to fetch (%.3f GB) from %s.", self.name, len(sizes), of, sum(sizes) / 1e9, where
        )

    def _in_parallel(self, do: Callable[[File], Result], files: Sequence[File]) -> list[Result]:
        """Let some be done at once. After an error none is begun; after an interruption those under way end, too."""
        return in_threads(do, files, self._stop.set, AT_ONCE)

    def _fetch(self, source: Source, file: File) -> None:
        """Fetch one file, check it and say so. Raises what the hub's client raises, and BaseModelError."""
        began, path = time.monotonic(), self.target / file.path
        path.unlink(missing_ok=True)  # the client would keep a file of this name that it has fetched before
        by_pget = self._fetched_by_pget(source, file)
        if not by_pget:
            source.repository.download(file, self.target, self._stop.is_set)
            self._check(source, file, path)
        seconds, by = time.monotonic() - began, "pget" if by_pget else "huggingface_hub"
        logger.info("%s: %s, %d bytes in %.1f s by %s.", self.name, file.path, file.size, seconds, by)

    def _fetched_by_pget(self, source: Source, file: File) -> bool:
        """Whether pget has fetched it: a public file whose bytes can be checked."""
        if self.pget is None or file.sha256 is None or not source.repository.public:
            return False
        part = self.target / ".cache" / "klora" / f"{uuid.uuid4().hex}.incomplete"
        try:
            self.pget.fetch(source.repository.url(file), part, file.size, self._stop.is_set)
            self._check(source, file, part)
        except (PgetError, BaseModelError) as error:
            if self._stop.is_set():
                raise
            logger.warning("%s: pget has not fetched %s, huggingface_hub will: %s", self.name, file.path, error)
            return False
        else:
            (self.target / file.path).parent.mkdir(parents=True, exist_ok=True)
            part.replace(self.target / file.path)
            return True
        finally:
            part.unlink(missing_ok=True)

    def _check(self, source: Source, file: File, path: Path) -> None:
        """Raise BaseModelError, and remove the file, unless it is as the hub says."""
        size = path.stat().st_size if path.is_file() else 0
        sha256 = _sha256(path) if file.sha256 and size else None
        if (size, sha256) != (file.size, file.sha256):
            path.unlink(missing_ok=True)
            came, expected = _facts(size, sha256), _facts(file.size, file.sha256)
            where = f"{file.path} of {self.name} came from {source.repository.base.repository}"
            raise BaseModelError(f"{where} as {came}. Expected {expected}.")


def _facts(size: int, sha256: str | None) -> str:
    return f"{size} bytes with the SHA-256 {sha256}" if sha256 else f"{size} bytes"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
