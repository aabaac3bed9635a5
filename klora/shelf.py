"""LoRAs that requests used lately, kept as a base has read them; what fusions scored of them outlives the process."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from klora.lora import LoRA

logger = logging.getLogger(__name__)
ScoresPath = Callable[[Path], Path | None]
"""A LoRA file -> where its scores may be kept; None: nowhere."""
_Scores = dict[tuple[str, int], tuple[float, float]]
FORM = 1  # to be raised when files are read, or scored, otherwise than before


class Shelf:
    """The LoRAs used last, at most so many, by base and file. A file that has changed is another one."""

    def __init__(self, scores_path: ScoresPath, room: int = 4) -> None:
        self._scores_path, self._room = scores_path, room
        self._loras: OrderedDict[tuple[object, ...], LoRA] = OrderedDict()

    def take(self, base: str, path: Path, read: Callable[[Path], LoRA]) -> LoRA:
        """The LoRA of a file, read if need be. Raises what read raises."""
        real, facts = path.resolve(), path.stat()
        key = (base, real, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if key not in self._loras or path.is_dir():  # a folder's own facts say nothing of its files
            self._loras[key] = lora = read(path)
            if place := self._scores_path(path):
                lora.scores.update(_stored(place))
        self._loras.move_to_end(key)
        while len(self._loras) > self._room:
            self._loras.popitem(last=False)
        return self._loras[key]

    def keep_scores(self, path: Path, lora: LoRA) -> None:
        """Write what a fusion has found, if it found anything new."""
        place = self._scores_path(path)
        if place and lora.scores.keys() - _stored(place).keys():
            lines = [[name, k, *found] for (name, k), found in lora.scores.items()]
            part = place.with_suffix(f".{os.getpid()}")
            try:
                part.write_text(json.dumps({"form": FORM, "scores": lines}))
                part.replace(place)
            except OSError as error:  # a full disk costs a second next time, and no image
                logger.warning("The scores of %s are not kept: %s.", path.name, error.strerror)


def _stored(place: Path) -> _Scores:
    """{} where there is nothing, or nothing whole: it can be computed again."""
    try:
        found = json.loads(place.read_text())
        lines = found["scores"] if found["form"] == FORM else []
        return {(str(name), int(k)): (float(top), float(l1)) for name, k, top, l1 in lines}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
