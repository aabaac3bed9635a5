"""What a reference can be: one frozen value a kind. str() is canonical: equal references, equal text, and no secret.

Knows nothing of how people spell them, nor of which downloads they lead to.
"""

from dataclasses import dataclass, field
from urllib.parse import quote

from klora.errors import SourceError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pickle", ".pkl")  # reading one can run what its author wrote


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face model repository, or the folder in which to look for one.

    repository: "owner/name".  path: from the repository's root, "" for the root itself.  pin: sha256 in hex.
    """

    repository: str
    revision: str = "main"
    path: str = ""
    pin: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{quote(self.revision, safe='')}"
        path = f"/{quote(self.path)}" if self.path else ""
        return _pinned(f"hf:{self.repository}{revision}{path}", self.pin)


@dataclass(frozen=True)
class CivitaiFile:
    """A version of a CivitAI model, or the newest one of a model; never both numbers, for the version says it all.

    file: its number, where a version has several.  size, fp: what else tells them apart ("pruned", "fp16").
    """

    version: int | None = None
    model: int | None = None
    file: int | None = None
    size: str | None = None
    fp: str | None = None
    pin: str | None = None

    def __str__(self) -> str:
        number = f"models/{self.model}" if self.version is None else f"{self.version}"
        file = "" if self.file is None else f"+{self.file}"
        query = "&".join(f"{key}={value}" for key, value in (("fp", self.fp), ("size", self.size)) if value)
        return _pinned(f"civitai:{number}{file}{f'?{query}' if query else ''}", self.pin)


@dataclass(frozen=True)
class ReplicateModel:
    """The weights of a model that was trained on Replicate, in a version or the newest one.

    model: "owner/name".
    """

    model: str
    version: str | None = None
    pin: str | None = None

    def __str__(self) -> str:
        return _pinned(f"replicate:{self.model}{f':{self.version}' if self.version else ''}", self.pin)


@dataclass(frozen=True)
class Bare:
    """ "owner/name" without an authority: Replicate is asked first, then Hugging Face."""

    name: str
    pin: str | None = None

    def __str__(self) -> str:
        return _pinned(self.name, self.pin)

    def candidates(self) -> tuple[ReplicateModel, HubFile]:
        """What it may mean, in the order in which to ask."""
        return ReplicateModel(self.name, pin=self.pin), HubFile(self.name, pin=self.pin)


@dataclass(frozen=True)
class Url:
    """A file at a web address that is none of the authorities' pages.

    address: scheme, host, port unless it is the scheme's own, path, and what of the query says which file it is.
    request: the address to ask, with its query as given.  secret: the parts of the query that grant access, "" if
    none does; a file that was fetched with them is lent only to requests that bring them again.
    """

    address: str
    request: str = field(repr=False, compare=False)
    secret: str = field(default="", repr=False, compare=False)
    pin: str | None = None

    def __str__(self) -> str:
        return _pinned(self.address, self.pin)


@dataclass(frozen=True)
class Data:
    """A file that came within the reference. sha256: of the payload, in hex. str() cannot be parsed again."""

    sha256: str
    payload: bytes = field(repr=False, compare=False)
    pin: str | None = None

    def __str__(self) -> str:
        return _pinned(f"data:{self.sha256}", self.pin)


@dataclass(frozen=True)
class Local:
    """A file of the server's own LoRA folder, wherever that is. path: relative to it, without ".."."""

    path: str
    pin: str | None = None

    def __str__(self) -> str:
        return _pinned(f"./{self.path}", self.pin)


Reference = HubFile | CivitaiFile | ReplicateModel | Bare | Url | Data | Local


def plain_path(path: str) -> str:
    """The parts of a decoded path, joined by single slashes.

    Raises SourceError where it does not simply descend, cannot be printed, or ends in the name of a pickle.
    """
    parts = [part for part in path.split("/") if part]
    if not {".", ".."}.isdisjoint(parts):
        raise SourceError("its path has '.' or '..' in it. Expected a path that only descends.")
    if "\\" in path or not path.isprintable():
        raise SourceError("its path has a backslash or a control character in it. Expected one of plain characters.")
    if parts and parts[-1].lower().endswith(PICKLES):
        raise SourceError("it is a pickle by its name, and reading one can run code. Expected a .safetensors file.")
    return "/".join(parts)


def _pinned(text: str, pin: str | None) -> str:
    return f"{text}#sha256={pin}" if pin else text
