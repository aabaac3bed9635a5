"""Writing the results of a training: each file appears whole or not at all, and an error is one sentence. No torch."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path

from safetensors import SafetensorError

from klora.errors import RequestError

RESUME_STATE = "run.safetensors"  # the file of Run.save(), from which a training is resumed


@contextmanager
def writing(what: str = "training") -> Iterator[None]:
    """Have every error of writing in the block raised as a RequestError. what: "The {what} could not be written"."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RequestError(f"The {what} could not be written: {error}. Expected more room on the disk.") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields another path, beside this one, to write a file to. After the block the file replaces the one at this path;
    if the block raises, it is removed. Raises RequestError."""
    part = _part(path)
    try:
        with writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        with suppress(OSError):  # of a disk that has failed, which was reported
            part.unlink(missing_ok=True)


def require_place(out: Path) -> None:
    """Make the folder of a file that will be written hours later. Raises RequestError where it could not be written."""
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
    """Write a folder into a tar, without names of owners. If that fails, the folder is moved out of its temporary
    parent, and the RequestError says where to."""
    try:
        with whole(out) as part, tarfile.open(part, "w") as tar:
            for file in sorted(folder.rglob("*")):
                tar.add(file, file.relative_to(folder).as_posix(), recursive=False, filter=_without_owner)
    except RequestError as error:
        folder.chmod(0o700)
        kept = folder.rename(f"{folder.parent}-kept")  # which needs no room
        raise RequestError(f"{error} What was learnt is in {kept}; resume_from takes it as a tar.") from error
    return out


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _part(path: Path) -> Path:
    # The whole name, so that dog.v1 and dog.v2 do not share one, and none is the path itself.
    return path.with_name(f".{path.name}.part")
