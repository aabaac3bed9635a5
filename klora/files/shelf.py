"""A cache of LoRAs as a base has read them, and of facts on their files; and a file of scores, which outlives the
process.

Scores are stored under the sha256 of the LoRA's files, for they depend on the weights alone and on how those are read:
whatever a reference calls a file, and whoever its partner is, it is scored once.
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
FILES = 1000  # of which origin, sha256 and the last writing of scores are remembered
FORM = 3  # of the stored scores; to be raised when files are read, or scored, otherwise than before


class Shelf:
    """The LoRAs used last, by base and by file. room: how many of them are kept."""

    def __init__(self, room: int = 4) -> None:
        self._room = room
        self._loras: OrderedDict[Hashable, LoRA] = OrderedDict()
        self._origins: OrderedDict[Hashable, Any] = OrderedDict()
        self._sha256: OrderedDict[Hashable, str] = OrderedDict()
        self._kept: OrderedDict[Hashable, None] = OrderedDict()

    def take(self, base: str, path: Path, read: Callable[[Path], LoRA], scores: Path | None = None) -> LoRA:
        """The LoRA of a file, read if need be, with the scores that keep_scores() has stored at that path. Raises what
        read raises."""

        def scored() -> LoRA:
            lora = read(path)
            lora.scores.update(_read_scores(scores) if scores else {})
            return lora

        return _remembered(self._loras, (base, _identity(path)), scored, self._room)

    def clear(self) -> None:
        """Forget the LoRAs, whose memory is then free; facts on files stay."""
        self._loras.clear()

    def keep(self, path: Path, lora: LoRA) -> None:
        """keep_scores(), unless this shelf has stored as many there before."""
        kept = path, sum(map(len, lora.scores.values()))
        if not path.exists():  # it went with its file, or could not be written
            self._kept.pop(kept, None)
        _remembered(self._kept, kept, lambda: keep_scores(path, lora), FILES)

    def origin(self, path: Path, read: Callable[[Path], T]) -> T:
        """read(path), once for a file. Raises what read raises."""
        origin: T = _remembered(self._origins, _identity(path), lambda: read(path), FILES)
        return origin

    def sha256(self, path: Path, scores: Path | None = None) -> tuple[str, ...]:
        """The sha256 of each file that a LoRA is read from, in hex: of a fetched one by the name of its file of scores,
        as the cache has named it; of others computed once. Raises LoRAError where a folder does not tell which
        files."""
        return tuple(scores.stem.split("-")) if scores else tuple(map(self._digest, files_of(path).values()))

    def _digest(self, file: Path) -> str:
        def read() -> str:
            with file.open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()

        return _remembered(self._sha256, _identity(file), read, FILES)


def _remembered(memory: OrderedDict[Hashable, T], key: Hashable, find: Callable[[], T], room: int) -> T:
    """memory[key], found if it is missing; of more than room entries the least recently used ones are dropped."""
    found = memory[key] = memory.pop(key) if key in memory else find()
    while len(memory) > room:
        memory.popitem(last=False)
    return found


def keep_scores(path: Path, lora: LoRA) -> None:
    """Store a LoRA's scores, if some of them are new, together with those that are there, which others may have
    written.

    The file, {"form": FORM, "scores": {layer: {K: sum of its K largest |dW|}}}, is replaced as a whole.
    """
    stored = _read_scores(path)
    if all(stored.get(name, {}).keys() >= sums.keys() for name, sums in lora.scores.items()):
        return
    scores = {name: stored.get(name, {}) | sums for name, sums in lora.scores.items()}
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps({"form": FORM, "scores": scores}))
        part.replace(path)
    except OSError as error:  # on a full disk they are computed again next time, which takes a second
        logger.warning("Scores are not kept: %s.", error.strerror)


def _identity(path: Path) -> tuple[tuple[int, ...], ...]:
    """What tells, without reading them, that a LoRA's files are the same and unchanged: equal for links to one file.
    Raises LoRAError."""
    with in_words(path):
        found = [file.stat() for file in files_of(path).values()]
    # The time of change tells of what keeps size and time when it overwrites. Of the cache's files, which nobody does
    # that to, each loan's link changes it.
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_nlink == 1 and s.st_ctime_ns) for s in found)


def _read_scores(path: Path) -> _Scores:
    """The stored scores; {} where there are none or the file is damaged: they can be computed again."""
    try:
        found = json.loads(path.read_text())
        scores = found["scores"].items() if found["form"] == FORM else ()
        return {name: {int(k): float(total) for k, total in sums.items()} for name, sums in scores}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
