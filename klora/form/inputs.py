"""What both web forms make of what a server hands them, before the inputs mean anything. Knows no input and no Cog."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from klora.errors import RequestError


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that were given: a web form sends a blank field as an empty text."""
    return {name: value for name, value in given.items() if value is not None and value != ""}


def uploaded(name: str, path: Any) -> Path:  # Any: Cog's path class, which is no Path of ours
    """The server's own copy of an upload. Raises RequestError: a bare text would open any file of the container."""
    local, scratch = Path(str(path)).resolve(), Path(tempfile.gettempdir()).resolve()
    # What Cog fetched comes as its path class, a bare text as it was sent; the rest holds if Cog should change that.
    if isinstance(path, str) or not local.is_relative_to(scratch) or not local.is_file():
        raise RequestError(f"{name} is {str(path)!r:.200}. Expected an uploaded file, an http(s) URL or a data URI.")
    return local


def progress_line(step: int, steps: int, postfix: str = "") -> str:
    """A line that Replicate's clients parse; they need a newline after each and no description before it."""
    layout = "{percentage:3.0f}%|{bar:20}| {n}/{total}{postfix}"
    return tqdm.format_meter(step, steps, elapsed=0, bar_format=layout, postfix=postfix)
