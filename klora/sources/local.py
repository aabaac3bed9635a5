"""The LoRA files of this machine: what lies at a path, below one folder or anywhere. Asks nobody.

name, everywhere: the input whose reference it is, of which errors speak.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from klora.errors import LoRAError, SourceError
from klora.sources.kinds import Local, Reference
from klora.sources.reference import parse

# Who writes owner/name/file.safetensors mostly means Hugging Face's.
_ELSEWHERE = "a reference such as hf:owner/name/file.safetensors or an https address"


def parsed(name: str, text: str) -> Reference:
    """parse(text). Raises SourceError with the input's name in front."""
    try:
        return parse(text)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None


def path_or_reference(name: str, text: str) -> Reference:
    """What a text means to the owner of the machine: any file, which may be pinned, or folder at this path, else what
    parsed() takes it for. Raises LoRAError for a path at which nothing is, SourceError as parsed() does."""
    body, _, pin = text.rpartition("#sha256=")
    with suppress(OSError, ValueError):  # a name that the file system cannot take
        if text and Path(text).exists():  # "" is no path, and would be the working folder
            return Local(text)
        if body and Path(body).is_file():
            return Local(body, pin=pin.lower())
    climbs = ":" not in text and ".." in Path(text).parts
    only_a_path = climbs or text.startswith(("/", "~", "."))
    with suppress(OSError, *([SourceError] if only_a_path else [])):
        reference = parsed(name, text)
        if not isinstance(reference, Local) or Path(reference.path).is_file():
            return reference
    raise LoRAError(
        f"{name} is {text!r:.200}, but there is no such file, or none that can be read. Expected the path of a LoRA, "
        "or a reference such as hf:owner/name or an https address."
    )


def lora_path(reference: str, root: Path | None, name: str) -> Path:
    """The file below root that a LoRA reference names. name: the input, for the message. Raises LoRAError, which says
    nothing of what lies elsewhere."""
    if root is None:
        raise LoRAError(
            f"{name} is {reference!r}, but this server takes no LoRA paths: KLORA_LORA_ROOT is not set. "
            f"Expected {_ELSEWHERE}."
        )
    try:
        path = (root / reference).resolve()
        inside = path.is_relative_to(root.resolve()) and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that the file system cannot take, a link that goes round
        inside = False
    if not inside:
        raise LoRAError(
            f"{name} is {reference!r}. Expected the path of a .safetensors file in the server's LoRA folder, or "
            f"{_ELSEWHERE}."
        )
    return path


def pinned(path: Path, reference: Local, name: str) -> Path:
    """The path of a local file, once its sha256 is that of the reference's pin, if it has one. Raises SourceError."""
    if reference.pin:
        try:
            with path.open("rb") as file:
                seen = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            why = error.strerror  # its own text names the folder
            raise SourceError(f"{name}: {reference.path} cannot be read: {why}. Expected one that can.") from error
        if seen != reference.pin:
            raise SourceError(f"{name}: {reference.path} has the sha256 {seen}. Expected {reference.pin}, its pin.")
    return path
