"""Files that come back: data URIs, or URLs where the server put them. Knows what is an image, a heat map, a table."""

import base64
import io
import mimetypes
import re
import tarfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

SAMPLES = 60  # pictures shown of one tar
SAMPLE_BYTES = 50 << 20


@dataclass(frozen=True)
class Output:
    """One file. name: the server's, where it gives one, else ours, a number and an ending."""

    name: str
    mime: str
    data: bytes

    @property
    def is_image(self) -> bool:
        """To be looked at."""
        return self.mime.startswith("image/")

    def saved(self, folder: Path) -> str:
        """The path of a new file with it, under its own name."""
        place = folder / uuid.uuid4().hex / self.name
        place.parent.mkdir(parents=True)
        place.write_bytes(self.data)
        return str(place)


@dataclass(frozen=True)
class Made:
    """What a prediction made. images: pictures or contact sheets; heat_map, table: of the report, where asked for; tar:
    in the place of them all, where a file of prompts was given."""

    images: list[Output]
    heat_map: Output | None
    table: Output | None
    tar: Output | None


def files_of(output: Any, fetch: Callable[[str], bytes], *named: Any) -> list[Output]:
    """The files of a prediction's or a training's output, by name where all have one: uploads end in any order.

    named: what tells those without a name from other requests'.
    """
    stem = re.sub(r"\W+", "-", "_".join(str(word) for word in named if word is not None))[:60]
    listed = output.values() if isinstance(output, dict) else [output] if isinstance(output, str) else output or []
    files = [_file(f"{stem}_{number}", uri, fetch) for number, uri in enumerate(listed)]
    return files if any(uri.startswith("data:") for uri in listed) else sorted(files, key=lambda file: file.name)


def sorted_out(files: Sequence[Output], *, reported: bool) -> Made:
    """What is what. reported: whether a report was asked for; without names its picture is the last one."""
    images = [file for file in files if file.is_image]
    maps = [file for file in images if "report" in file.name]
    heat_map = maps[0] if maps else images[-1] if reported and len(images) > 1 else None
    table, tar = (next((f for f in files if f.mime == f"application/{kind}"), None) for kind in ("json", "x-tar"))
    return Made([image for image in images if image is not heat_map], heat_map, table, tar)


def samples_in(tar: bytes) -> list[Output]:
    """The first pictures in a tar, by name; unreadable members end the search."""
    found: list[Output] = []
    # As a stream, which never goes back: members of negative sizes would follow one another for ever (CVE-2025-8194).
    unreadable = (tarfile.TarError, ValueError, RecursionError)
    with suppress(*unreadable), tarfile.open(fileobj=io.BytesIO(tar), mode="r|") as members:
        for member in members:
            mime = mimetypes.guess_type(member.name)[0] or ""
            file = members.extractfile(member) if mime.startswith("image/") and member.size < SAMPLE_BYTES else None
            if file and len(found) < SAMPLES:
                found.append(Output(PurePosixPath(member.name).name, mime, file.read()))
    return sorted(found, key=lambda file: file.name)


def _file(own: str, uri: str, fetch: Callable[[str], bytes]) -> Output:
    if uri.startswith("data:"):
        head, _, data = uri.partition(",")
        mime = head.removeprefix("data:").partition(";")[0]
        return Output(f"{own}{mimetypes.guess_extension(mime) or ''}", mime, base64.b64decode(data))
    name = PurePosixPath(unquote(urlsplit(uri).path)).name or own
    return Output(name, mimetypes.guess_type(name)[0] or "application/octet-stream", fetch(uri))
