"""Writing what comes of a training: files that appear whole, and one sentence where they cannot. Knows no torch."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path

from safetensors import SafetensorError

from klora.errors import RequestError

RESUME_STATE = "run.safetensors"  # all that it takes to go on


@contextmanager
def writing(what: str = "training") -> Iterator[None]:
    """In which only files are written. Raises RequestError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RequestError(f"The {what} could not be written: {error}. Expected more room on the disk.") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name, beside the path, to write a file under; it takes the path's place when all of it is there, and is
    gone when it is not. Raises RequestError."""
    part = _part(path)
    try:
        with writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        with suppress(OSError):  # of a disk that has failed, which has been told
            part.unlink(missing_ok=True)


def require_place(out: Path) -> None:
    """Make the folder of a file that will be written after hours of work. Raises RequestError where none can be."""
    try:
        if out.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        out.parent.mkdir(parents=True, exist_ok=True)
        _part(out).touch()
        _part(out).unlink()
    except OSError as error:
        raise RequestError(
            f"out is {str(out)!r}, where no file can be made: {error.strerror}. Expected a place to write."
        ) from error


def tarred(folder: Path, out: Path) -> Path:
    """The folder in a tar, which says nothing of whose it is. Raises RequestError, which says where the folder is then:
    beside its own, and so not gone with that."""
    try:
        with whole(out) as part, tarfile.open(part, "w") as tar:
            for file in sorted(folder.rglob("*")):
                tar.add(file, file.relative_to(folder).as_posix(), recursive=False, filter=_nobodys)
    except RequestError as error:
        folder.chmod(0o700)
        kept = folder.rename(f"{folder.parent}-kept")  # which needs no room
        raise RequestError(f"{error} What was learnt is in {kept}; resume_from takes it as a tar.") from error
    return out


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _part(path: Path) -> Path:
    # The whole name, so that dog.v1 and dog.v2 do not share one, and none is the path itself.
    return path.with_name(f".{path.name}.part")
