"""The files of an image: 00007.png, 00007.txt, its caption, and 00007.json, how it was made. Knows no model.

The .json is written last, and says that the image is done. With .txt beside .png the folder is a training set.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from klora.bulk.lines import Fault, Job, by_line, named
from klora.errors import LoRAError, RequestError, SourceError
from klora.form.request import Request
from klora.sources.kinds import Local
from klora.sources.reference import parse
from klora.studio.provenance import FORM, UsedLoRA, canonical, picture_sha256, read_provenance, stamp

_KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_LONGEST = 80  # characters of a value that are shown


@dataclass(frozen=True)
class Folder:
    """Where the images of a prompt file go. Several may write to it at once, each its own images.

    sha256: in hex, of each file of the local LoRAs, by reference: a path alone does not tell which images are its own.
    seen: of the others, which may change where they are: what the first image here was made with by that reference, as
    far as this process knows.
    """

    path: Path
    sha256: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seen: dict[str, Sequence[str]] = field(default_factory=dict)

    def done(self, job: Job) -> bool:
        """Whether its image is there, or was withheld. Raises RequestError where it is another request's."""
        file = self._place(job, "json")
        try:
            record = json.loads(file.read_bytes())
            asked, withheld, loras = record["asked"], record.get("withheld", False), record.get("loras", {})
            used = {name: list(loras[name]["sha256"]) for name in job.request.loras if name in loras}
        except FileNotFoundError:
            captioned = (caption := self._place(job, "txt")).exists()  # asked first, as it is written after the image
            if (image := self._place(job, job.request.output_format)).exists():
                read_provenance(image)  # one of ours that was interrupted before its record; another's is refused
            elif captioned:
                raise RequestError(f"{caption} is no caption of klora generate's. Expected an empty folder.") from None
            return False
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RequestError(f"{file} is no record of klora generate. Expected an empty folder.") from error
        if asked != (wanted := asked_of(job.request)):
            raise RequestError(f"{file} is another request's: {_difference(asked, wanted, job.line)}")
        if used != (now := self._first(job, used)):
            raise RequestError(f"{file} was made with a file of another sha256: {_difference(used, now, job.line)}")
        return withheld or self.shows(job)

    def shows(self, job: Job) -> bool:
        """Whether its image is there, and done."""
        return self._place(job, job.request.output_format).is_file() and self._place(job, "json").is_file()

    def check(self, job: Job, loras: Mapping[str, UsedLoRA]) -> None:
        """Raise LoRAError where a job would use another LoRA file than those that its reference made here before."""
        used = {name: list(loras[name].sha256) for name in job.request.loras}
        if used != (then := self._first(job, used)):
            raise LoRAError(f"{self.path} has images of another LoRA file: {_difference(then, used, job.line)}")

    def keep(self, job: Job, image: Image.Image) -> None:
        """Write a job's files. image: with its provenance and its caption in its info."""
        provenance, caption, kind = image.info["provenance"], image.info["caption"], job.request.output_format
        buffer = BytesIO()
        image.save(buffer, _KINDS[kind], quality=job.request.output_quality, **stamp(provenance, image.size, kind))
        self._write(job, kind, buffer.getvalue())
        self._write(job, "txt", caption.encode())
        self._mark(job, {**json.loads(provenance.record()), "caption": caption})

    def withhold(self, job: Job) -> None:
        """Write that the safety checker has withheld a job's image, so that it is not made again."""
        loras = {name: {"sha256": self.sha256[by]} for name, by in job.request.loras.items() if by in self.sha256}
        self._mark(job, {"klora": FORM, "seed": job.request.seed, "withheld": True, "loras": loras})

    def _first(self, job: Job, used: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """The sha256 that a job's LoRAs must have: those used, by input, where nothing else is known."""
        named = {name: job.request.loras[name] for name in used}
        return {name: list(self.sha256.get(by) or self.seen.setdefault(by, used[name])) for name, by in named.items()}

    def _mark(self, job: Job, record: dict[str, Any]) -> None:
        whole = {**record, "line": job.line, "asked": asked_of(job.request)}
        self._write(job, "json", json.dumps(whole, indent=1).encode())

    def _write(self, job: Job, suffix: str, content: bytes) -> None:
        """As a whole, or not at all."""
        path = self._place(job, suffix)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:  # of a full disk, which does not say whose
            part.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _place(self, job: Job, suffix: str) -> Path:
        return self.path / f"{job.index:05}.{suffix}"


def packed(folder: Path, faults: Sequence[Fault], tar: Path) -> Path:
    """All its files in one tar, and failures.txt, a line for each fault, where there is any. Raises RequestError where
    there is no image."""
    files = sorted(folder.iterdir())
    if not any(file.suffix[1:] in _KINDS for file in files):
        raise RequestError(f"No image was made. {named(faults)}" if faults else "Every image was withheld.")
    with tarfile.open(tar, "w") as packing:
        for file in files:
            packing.add(file, file.name)
        if faults:
            (folder / "failures.txt").write_text("".join(f"{fault}\n" for fault in by_line(faults)))
            packing.add(folder / "failures.txt", "failures.txt")
    return tar


def asked_of(request: Request) -> dict[str, Any]:
    """A request as JSON has it, without secrets: its inputs that differ from their defaults, LoRAs by their canonical
    references, pictures by the sha256 of their pixels."""
    inputs = request.changed | {name: _canonical(reference) for name, reference in request.loras.items()}
    return {name: picture_sha256(value) if isinstance(value, Image.Image) else value for name, value in inputs.items()}


def _canonical(reference: str) -> str:
    """Of a path the name alone, however it is spelled from here: of which file, its sha256 tells."""
    try:
        local = reference.startswith(("/", "../")) or isinstance(parse(reference), Local)
        name = canonical(reference, fetched=not local)
        return PurePath(name).name if local else name
    except SourceError:  # an odd name of a file that is there; or anything, be it a token in the wrong place
        return f"sha256 {sha256(reference.encode()).hexdigest()}"


def _difference(asked: Any, wanted: dict[str, Any], line: int) -> str:
    """The first input in which they differ; one that is not told has its default."""
    then = asked if isinstance(asked, dict) else {}
    name = next(name for name in (*wanted, *then) if then.get(name) != wanted.get(name))
    default = {item.name: item.default for item in fields(Request)}.get(name)
    seen, now = (f"{inputs.get(name, default)!r:.{_LONGEST}}" for inputs in (then, wanted))
    return f"its {name} is {seen}, and that of line {line} is {now}. Expected the same, or another folder."
