"""LoRAs that requests used lately, kept as a base has read them, and what their files said of themselves; what fusions
scored of them outlives the process.

Scores lie beside a cached file, under the sha256 of its content: whatever a reference calls it, and whoever is its
partner, a file is scored once. Nothing else enters, for they depend on the weights alone and on how those are read.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from klora.files.container import files_of, in_words
from klora.lora import LoRA

logger = logging.getLogger(__name__)
T = TypeVar("T")
_Scores = dict[str, dict[int, float]]
FILES = 1000  # whose facts are remembered
FORM = 3  # to be raised when files are read, or scored, otherwise than before


class Shelf:
    """The LoRAs used last, at most so many, by base and by what is in their files, wherever these lie."""

    def __init__(self, room: int = 4) -> None:
        self._room = room
        self._loras: OrderedDict[Hashable, LoRA] = OrderedDict()
        self._origins: OrderedDict[Hashable, Any] = OrderedDict()
        self._sha256: OrderedDict[Hashable, str] = OrderedDict()
        self._kept: OrderedDict[Hashable, None] = OrderedDict()

    def take(self, base: str, path: Path, read: Callable[[Path], LoRA], scores: Path | None = None) -> LoRA:
        """The LoRA of a file, read if need be. scores: where keep_scores() may have left some. Raises as read does."""

        def scored() -> LoRA:
            lora = read(path)
            lora.scores.update(_stored(scores) if scores else {})
            return lora

        return _remembered(self._loras, (base, _facts(path)), scored, self._room)

    def clear(self) -> None:
        """Let the LoRAs go, and with them the memory that they take; not what is known of files."""
        self._loras.clear()

    def keep(self, place: Path, lora: LoRA) -> None:
        """keep_scores(), but for scores that are there already."""
        kept = place, sum(map(len, lora.scores.values()))
        if not place.exists():  # it went with its file, or could not be written
            self._kept.pop(kept, None)
        _remembered(self._kept, kept, lambda: keep_scores(place, lora), FILES)

    def origin(self, path: Path, read: Callable[[Path], T]) -> T:
        """What read() says of a file, of the header of which nothing needs to be read twice. Raises as read does."""
        found: T = _remembered(self._origins, _facts(path), lambda: read(path), FILES)
        return found

    def sha256(self, path: Path, scores: Path | None = None) -> tuple[str, ...]:
        """Of each file that a LoRA is read from, in hex: for a fetched one as the cache knows it, which has named its
        scores so; else read once. Raises LoRAError where a folder does not tell which files."""
        return tuple(scores.stem.split("-")) if scores else tuple(map(self._digest, files_of(path).values()))

    def _digest(self, file: Path) -> str:
        def read() -> str:
            with file.open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()

        return _remembered(self._sha256, _facts(file), read, FILES)


def _remembered(memory: OrderedDict[Hashable, T], key: Hashable, find: Callable[[], T], room: int) -> T:
    """What is found for a key once; the least recently used ones go."""
    found = memory[key] = memory.pop(key) if key in memory else find()
    while len(memory) > room:
        memory.popitem(last=False)
    return found


def keep_scores(place: Path, lora: LoRA) -> None:
    """Write what a fusion has found, if it found anything new, with what others have written there.

    {"form": FORM, "scores": {layer: {K: sum of its K largest |dW|}}}, replaced as a whole.
    """
    stored = _stored(place)
    if all(stored.get(name, {}).keys() >= sums.keys() for name, sums in lora.scores.items()):
        return
    scores = {name: stored.get(name, {}) | sums for name, sums in lora.scores.items()}
    part = place.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps({"form": FORM, "scores": scores}))
        part.replace(place)
    except OSError as error:  # a full disk costs a second next time, and no image
        logger.warning("Scores are not kept: %s.", error.strerror)


def _facts(path: Path) -> tuple[tuple[int, ...], ...]:
    """By what a LoRA's files are known again without reading them: links to one file share them, and a changed one has
    others. Raises LoRAError."""
    with in_words(path):
        found = [file.stat() for file in files_of(path).values()]
    # The time of change tells of what keeps size and time when it overwrites. Of the cache's files, which nobody does
    # that to, each loan's link changes it.
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_nlink == 1 and s.st_ctime_ns) for s in found)


def _stored(place: Path) -> _Scores:
    """{} where there is nothing, or nothing whole: it can be computed again."""
    try:
        found = json.loads(place.read_text())
        scores = found["scores"].items() if found["form"] == FORM else ()
        return {name: {int(k): float(total) for k, total in sums.items()} for name, sums in scores}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
