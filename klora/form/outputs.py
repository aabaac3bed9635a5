"""Where a command's results go: what is there already is never overwritten. Knows no model, and not what is written."""

import os
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from klora.errors import RequestError


def check_writable(out: Path) -> None:
    """Raise RequestError where nothing can be written, before the work is done that would be."""
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK) or (nearest != out and not nearest.is_dir()):
        raise RequestError(f"out is {str(out)!r}, but {nearest} cannot be written to. Expected a path that can be.")


def check_new(out: Path, but: Path | None = None) -> None:
    """Raise RequestError where a file is, before the work is done that would overwrite it. but: the one that may be."""
    if out.exists() and not (but and out.samefile(but)):
        raise RequestError(f"out is {str(out)!r}, which is there already. Expected a new name: none is overwritten.")


def kept(write: Callable[[Path], Iterable[Path]], out: Path) -> list[Path]:
    """What write() puts into a folder, moved into out. A file whose name another one has is called klora_7_0-2.png, and
    so on; those of one stem have one number."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out) as folder:
        paths = list(write(Path(folder)))
        stems = {path.stem for path in paths}
        numbers = {stem: _number([path for path in paths if path.stem == stem], out) for stem in stems}
        return [path.replace(_place(path, out, numbers[path.stem])) for path in paths]


def _number(paths: list[Path], out: Path) -> int:
    """The first with which none of these files would take another one's place."""
    return next(n for n in count(1) if all(_is_free(_place(path, out, n), path.read_bytes()) for path in paths))


def _place(path: Path, out: Path, number: int) -> Path:
    return out / (path.name if number == 1 else f"{path.stem}-{number}{path.suffix}")


def _is_free(place: Path, content: bytes) -> bool:
    return not place.exists() or (place.is_file() and place.read_bytes() == content)
