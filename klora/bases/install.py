"""Fetches what a folder lacks of a base model. Every file is there whole, or not at all.

In the base's folder, .cache/klora/state holds the commits of its files and the word "begun" or "complete". The index,
by which others know that a base is installed, is fetched last.
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
AT_ONCE = 4  # files that are fetched, or hashed, at a time


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
    the large files of public repositories where no token is given; what it fails to fetch, the hub's client fetches.
    Of processes that want the same base at once, one fetches it and the others wait.
    """
    return listed(name, base, folder, token, endpoint=endpoint).install(pget)


def listed(name: str, base: Base, folder: Path, token: str | None = None, *, endpoint: str | None = None) -> "Listing":
    """The files that the hub has of a base, to be installed in folder/name. Writes nothing. Raises BaseModelError."""
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
    """The files that a repository has of a base. Raises BaseModelError where there are none, or no index in the
    repository that should have it."""
    base = repository.base
    with in_words(name, repository, target):
        files = repository.wanted()
    if not any(base.completed_by or file.path in INDICES for file in files):
        expected = " and ".join(base.files) if base.completed_by else "a diffusers folder"
        raise BaseModelError(f"{base.repository} at {base.revision} holds nothing of {name}. Expected {expected}.")
    return Source(repository, files)


@dataclass(frozen=True)
class Listing:
    """The files of a base at one commit of each of its sources. target: the folder to install them in."""

    base: Base
    name: str
    target: Path
    sources: Sequence[Source]

    @property
    def files(self) -> list[File]:
        """The files of all sources."""
        return [file for source in self.sources for file in source.files]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes of the files that are absent from the folder, or have another size there."""
        return sum(file.size for file in self.files if not _has_size(self.target / file.path, file.size))

    def distrust(self) -> None:
        """Forget that the files were checked, so that install() hashes them instead of comparing sizes only."""
        _state_file(self.target).unlink(missing_ok=True)

    def install(self, pget: Pget | None = None) -> Path:
        """Fetch what is missing, as ensure_base() does, and remove a build's note that it is. Raises BaseModelError."""
        with in_words(self.name, self.sources[0].repository, self.target):
            if not self._is_complete():
                self.target.mkdir(parents=True, exist_ok=True)
                with FileLock(self.target.with_name(f".{self.name}.lock")):
                    if not self._is_complete():  # another process may have fetched it meanwhile
                        _Installation(self.name, self.target, self.sources, pget).complete()
            setup_note(self.target.parent, self.name).unlink(missing_ok=True)
        return self.target

    def _is_complete(self) -> bool:
        """Whether all files were checked when they were fetched, and still have their sizes."""
        return _state(self.target) == f"{_commits(self.sources)} complete" and self.missing == 0


def check_room(names: Sequence[str], folder: Path, needed: int) -> None:
    """Raise BaseModelError unless the disk of a folder, which need not exist yet, has the needed bytes free. names: of
    the bases that need them."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BaseModelError(
            f"{' and '.join(names)} {'needs' if len(names) == 1 else 'need'} {needed / 1e9:.1f} GB more in {folder}, "
            f"where {free / 1e9:.1f} GB are free. Expected a disk with room for its files."
        )


def setup_note(folder: Path, name: str) -> Path:
    """The path of the note that a build leaves for a base which it has not fetched, so that set-up has to."""
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
    """The fetching of one base into its folder, whose lock is held meanwhile."""

    name: str
    target: Path
    sources: Sequence[Source]
    pget: Pget | None
    _stop: threading.Event = field(default_factory=threading.Event)

    def complete(self) -> None:
        """Fetch the files that are missing or differ from the hub's: source by source, each one's index last."""
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
        """Remove what killed processes left, and, unless the state names these commits, the files without a SHA-256."""
        for part in (self.target / ".cache").rglob("*.incomplete"):
            part.unlink(missing_ok=True)
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
        present = self._in_parallel(self._is_present, files)
        return [file for file, is_present in zip(files, present, strict=True) if not is_present]

    def _is_present(self, file: File) -> bool:
        path = self.target / file.path
        return _has_size(path, file.size) and file.sha256 in (None, _sha256(path))

    def _announce(self, missing: Sequence[Source]) -> None:
        """Log what will be fetched. Raises BaseModelError where there is no room for it."""
        sizes = [file.size for source in missing for file in source.files]
        check_room([self.name], self.target, sum(sizes))
        total, where = sum(len(source.files) for source in self.sources), " and ".join(map(str, self.sources))
        logger.info(
            "%s: %d of %d files to fetch (%.3f GB) from %s.", self.name, len(sizes), total, sum(sizes) / 1e9, where
        )

    def _in_parallel(self, do: Callable[[File], Result], files: Sequence[File]) -> list[Result]:
        """What do returns for each file, AT_ONCE at a time. After an error none is begun; an interruption also
        ends those under way."""
        return in_threads(do, files, self._stop.set, AT_ONCE)

    def _fetch(self, source: Source, file: File) -> None:
        """Fetch one file, check it and log so. Raises what the hub's client raises, and BaseModelError."""
        start, path = time.monotonic(), self.target / file.path
        path.unlink(missing_ok=True)  # the client would keep a file of this name that it has fetched before
        by_pget = self._fetched_by_pget(source, file)
        if not by_pget:
            source.repository.download(file, self.target, self._stop.is_set)
            self._check(source, file, path)
        seconds, by = time.monotonic() - start, "pget" if by_pget else "huggingface_hub"
        logger.info("%s: %s, %d bytes in %.1f s by %s.", self.name, file.path, file.size, seconds, by)

    def _fetched_by_pget(self, source: Source, file: File) -> bool:
        """Fetch a file by pget and return True; False where that fails, or the file is not public or has no SHA-256 to
        check it by."""
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
        """Raise BaseModelError, and remove what is at path, unless its size and SHA-256 are the hub's."""
        size = path.stat().st_size if path.is_file() else 0
        sha256 = _sha256(path) if file.sha256 and size else None
        if (size, sha256) != (file.size, file.sha256):
            path.unlink(missing_ok=True)
            actual, expected = _described(size, sha256), _described(file.size, file.sha256)
            where = f"{file.path} of {self.name} came from {source.repository.base.repository}"
            raise BaseModelError(f"{where} as {actual}. Expected {expected}.")


def _described(size: int, sha256: str | None) -> str:
    return f"{size} bytes with the SHA-256 {sha256}" if sha256 else f"{size} bytes"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
