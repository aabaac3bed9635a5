"""LoRA files by what is in them, under whatever name. Knows no request."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from klora.errors import LoRAError
from klora.files.shelf import Shelf


def digests(references: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{reference: sha256 of each file of that LoRA, in hex}, of those that are paths on this machine, also pinned ones.

    Without what cannot be read: whoever uses it is told why.
    """
    shelf, found = Shelf(), dict[str, tuple[str, ...]]()
    for reference in references:
        for path in (reference, reference.partition("#sha256=")[0]):
            with suppress(OSError, ValueError, LoRAError):  # ValueError: a name that no file can have
                found.setdefault(reference, shelf.sha256(Path(path)))
    return found
