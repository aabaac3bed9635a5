"""LoRAs that requests used lately, kept as a base has read them; what fusions scored of them outlives the process."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from klora.files.container import files_of
from klora.lora import LoRA

logger = logging.getLogger(__name__)
_Scores = dict[tuple[str, int], tuple[float, float]]
FORM = 1  # to be raised when files are read, or scored, otherwise than before


class Shelf:
    """The LoRAs used last, at most so many, by base and by what is in their files, wherever these lie."""

    def __init__(self, room: int = 4) -> None:
        self._room = room
        self._loras: OrderedDict[tuple[object, ...], LoRA] = OrderedDict()

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


def keep_scores(place: Path, lora: LoRA) -> None:
    """Write what a fusion has found, if it found anything new."""
    if not lora.scores.keys() - _stored(place).keys():
        return
    lines = [[name, k, *found] for (name, k), found in lora.scores.items()]
    part = place.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps({"form": FORM, "scores": lines}))
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
        lines = found["scores"] if found["form"] == FORM else []
        return {(str(name), int(k)): (float(top), float(l1)) for name, k, top, l1 in lines}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
