"""What takes a base, or the safety checker, apart: a folder less, a file cut short, a tensor lost."""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file


def without(part: str) -> Callable[[Path], object]:
    return lambda base: shutil.rmtree(base / part)


def cut(file: str) -> Callable[[Path], object]:
    return lambda base: (base / file).write_bytes((base / file).read_bytes()[:-1000])


def lacking(file: str, *names: str) -> Callable[[Path], object]:
    """Take tensors out of a file; without names, the first by name."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        for name in names or sorted(tensors)[:1]:
            del tensors[name]
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage
