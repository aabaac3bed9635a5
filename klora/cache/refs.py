"""What is known of references: which blobs they came to, for whom, and when that was last allowed. One JSON file each.

A ref's time of modification is when it was last used: the LRU order, which so survives restarts. Never holds a secret.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

PUBLIC = "public"
MAX_AGE = 600.0  # seconds that an authority's word holds

SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,80}")


class Moment(NamedTuple):
    """Now, by two clocks: seconds since 1970, and since the machine started."""

    wall: float
    running: float

    @classmethod
    def now(cls) -> Self:
        """By the machine's clocks."""
        return cls(time.time(), time.monotonic())

    def is_recent(self, seconds: float) -> bool:
        """Whether both clocks say so: one may have been put back, the other begins again with the machine."""
        return all(0 <= now - then <= seconds for now, then in zip(Moment.now(), self, strict=True))


@dataclass(frozen=True)
class File:
    """A file of a reference. key: its immutable identity; name: what it is called; size: in bytes."""

    key: str
    name: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not (SHA256.fullmatch(self.sha256) and _NAME.fullmatch(self.name)):
            raise ValueError(f"a file called {self.name!r} with sha256 {self.sha256!r}")


@dataclass(frozen=True)
class Ref:
    """What a reference came to. scope: PUBLIC, or the keyed hash of the credential it was asked for with.

    files: the LoRA, and what lies beside it.
    """

    reference: str
    scope: str
    files: tuple[File, ...]
    authorised: Moment
    base_model: str | None = None
    triggers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The ref's own, in hex."""
        return ref_name(self.reference, self.scope)

    @property
    def size(self) -> int:
        """Of its files, in bytes."""
        return sum(file.size for file in self.files)

    @classmethod
    def read(cls, text: bytes) -> "Ref":
        """From JSON. Raises ValueError, TypeError or KeyError where it is no ref."""
        parts: dict[str, Any] = json.loads(text)
        parts["files"] = tuple(File(**file) for file in parts["files"])
        parts["authorised"] = Moment(*map(float, parts["authorised"]))
        parts["triggers"] = tuple(parts["triggers"])
        return cls(**parts)

    def json(self) -> bytes:
        """What read takes."""
        return json.dumps(asdict(self)).encode()


def ref_name(reference: str, scope: str) -> str:
    """What the ref of a reference in a scope is called."""
    return hashlib.sha256(f"{scope}\0{reference}".encode()).hexdigest()


class Refs:
    """The folder of refs. What is damaged in it counts as missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Where a ref lies, or would."""
        return self._folder / f"{name}.json"

    def get(self, name: str) -> Ref | None:
        """The ref of this name."""
        try:
            ref = Ref.read(self.path(name).read_bytes())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return ref if ref.name == name and ref.files else None

    def touch(self, name: str) -> None:
        """Record that it is used now."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(name))

    def forget(self, name: str) -> None:
        """Remove it; its blobs stay until space is short."""
        self.path(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Of all refs, also of damaged ones."""
        return [path.stem for path in self._folder.iterdir()]

    def by_blob(self) -> dict[str, set[str]]:
        """{sha256 of a blob: the names of the refs that name it}."""
        names: dict[str, set[str]] = {}
        for name in self.names():
            for file in ref.files if (ref := self.get(name)) else ():
                names.setdefault(file.sha256, set()).add(name)
        return names

    def last_use(self, name: str) -> float:
        """Seconds since 1970. 0 where it is gone, or where the time is in the future because a clock was wrong: its
        next use corrects that."""
        with contextlib.suppress(OSError):
            used = self.path(name).stat().st_mtime
            return used if used <= time.time() else 0.0
        return 0.0
