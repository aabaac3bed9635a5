"""LoRAs that requests used lately, kept as a base has read them; what fusions scored of them outlives the process.

Scores lie beside a cached file, under the sha256 of its content: whatever a reference calls it, and whoever is its
partner, a file is scored once. Nothing else enters, for they depend on the weights alone and on how those are read.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from klora.files.container import files_of
from klora.lora import LoRA

logger = logging.getLogger(__name__)
_Scores = dict[str, dict[int, float]]
DIGESTS = 1000  # of local files, remembered
FORM = 3  # to be raised when files are read, or scored, otherwise than before


class Shelf:
    """The LoRAs used last, at most so many, by base and by what is in their files, wherever these lie."""

    def __init__(self, room: int = 4) -> None:
        self._room = room
        self._loras: OrderedDict[tuple[object, ...], LoRA] = OrderedDict()
        self._sha256: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def take(self, base: str, path: Path, read: Callable[[Path], LoRA], scores: Path | None = None) -> LoRA:
        """The LoRA of a file, read if need be. scores: where keep_scores() may have left some. Raises as read does."""
        key = (base, *map(_facts, files_of(path).values()))
        if key not in self._loras:
            self._loras[key] = lora = read(path)
            if scores:
                lora.scores.update(_stored(scores))
        self._loras.move_to_end(key)
        while len(self._loras) > self._room:
            self._loras.popitem(last=False)
        return self._loras[key]

    def sha256(self, path: Path, scores: Path | None = None) -> tuple[str, ...]:
        """Of each file that a LoRA is read from, in hex: for a fetched one as the cache knows it, which has named its
        scores so; else read once. Raises LoRAError where a folder does not tell which files."""
        return tuple(scores.stem.split("-")) if scores else tuple(map(self._digest, files_of(path).values()))

    def _digest(self, file: Path) -> str:
        facts = _facts(file)
        if facts not in self._sha256:
            with file.open("rb") as content:
                self._sha256[facts] = hashlib.file_digest(content, "sha256").hexdigest()
        while len(self._sha256) > DIGESTS:
            self._sha256.popitem(last=False)
        return self._sha256[facts]


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


def _facts(path: Path) -> tuple[int, ...]:
    """By what a file is known again without reading it: links to one file share them, and a changed one has others."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stored(place: Path) -> _Scores:
    """{} where there is nothing, or nothing whole: it can be computed again."""
    try:
        found = json.loads(place.read_text())
        scores = found["scores"].items() if found["form"] == FORM else ()
        return {name: {int(k): float(total) for k, total in sums.items()} for name, sums in scores}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
