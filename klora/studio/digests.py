"""LoRA files by their content, under whatever name. Knows no request."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from klora.errors import LoRAError
from klora.files.shelf import Shelf


def digests(references: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{reference: sha256 of each file of that LoRA, in hex}, for references that are paths here, pinned or not.

    A file that cannot be read is left out: using it raises the reason.
    """
    shelf, by_reference = Shelf(), dict[str, tuple[str, ...]]()
    for reference in references:
        for path in (reference, reference.partition("#sha256=")[0]):
            with suppress(OSError, ValueError, LoRAError):  # ValueError: a name that no file can have
                by_reference.setdefault(reference, shelf.sha256(Path(path)))
    return by_reference
