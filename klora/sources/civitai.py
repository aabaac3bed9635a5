"""A CivitAI reference -> a download. Its API is asked for the version and its files, then whether the file may be had.

civitai.com, .green and .red are one authority: one token, one table of numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from klora.errors import SourceError
from klora.sources.authority import Client, bearer, file_name, plain_words, understood
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, family_of
from klora.sources.kinds import CivitaiFile
from klora.sources.network import Network

AUTHORITY = "CivitAI"
MAX_LISTED = 20  # files, in a message

# Only who sends JSON is told of an error in JSON: everybody else is shown a login page, with status 200.
_HEADERS = {"Content-Type": "application/json"}
_LORAS = ("LORA", "LoCon", "DoRA")
_SELECTORS = ("format", "size", "fp")  # of a file's metadata, that a download link may name


@dataclass(frozen=True)
class _File:
    """number: unique.  kind: "Model", "Training Data", ...  metadata: format, size and fp, where they are known.
    bytes: None where CivitAI has only a rounded figure."""

    number: int
    name: str
    kind: str
    primary: bool
    metadata: Mapping[str, str]
    bytes: int | None
    sha256: str | None


@dataclass(frozen=True)
class _Version:
    """kind: of the model, "LORA", "Checkpoint", ...  usage: "Download" where files may be had at all."""

    number: int
    kind: str
    usage: str
    base_model: str | None
    triggers: tuple[str, ...]
    files: tuple[_File, ...]


def resolve(
    reference: CivitaiFile, token: str | None, endpoint: str, net: Network, deadline: Deadline
) -> tuple[Download, ...]:
    """The LoRA of a version, or of a model's newest one. token: the user's; without one nobody's is used.

    Raises NotFound, Denied, Unreachable, and SourceError where it is no LoRA in safetensors.
    """
    client = Client(endpoint, _HEADERS | bearer(token, AUTHORITY), net, deadline)
    try:
        version = _version(reference, client)
        download = _download(version, _chosen(reference, version), client)
        if _is_page(client.redirection(download.url), endpoint):
            raise Denied("a login page")
    except NotFound:
        raise NotFound(
            f"{reference} is not on {AUTHORITY}. Expected the number of a published version, or its model's page."
        ) from None
    except Denied:
        seen = "the token that was given may not have it" if token else "no token was given"
        raise Denied(
            f"{reference} is for members only, or not for everybody yet, and {seen}. Expected the {AUTHORITY} token "
            "of somebody who may download it."
        ) from None
    return (download,)


def _version(reference: CivitaiFile, client: Client) -> _Version:
    api, number = f"{client.endpoint}/api/v1", reference.version
    if number is None:
        model = client.json(f"{api}/models/{reference.model}")
        with understood(AUTHORITY):
            number = _newest(model)
    answer = client.json(f"{api}/model-versions/{number}")
    with understood(AUTHORITY):
        return _read(answer)


def _newest(model: Any) -> int:
    """The number of the newest version that may be for one of FAMILIES, or of the newest at all where none is: a page's
    versions are for many base models."""
    if not (versions := model["modelVersions"]):
        raise NotFound("a model without versions")
    ours = [version for version in versions if family_of(_base_model(version)) != ""]
    return int((ours or versions)[0]["id"])


def _base_model(version: Any) -> str | None:
    return next(iter(plain_words([version.get("baseModel")])), None)


def _read(answer: Any) -> _Version:
    return _Version(
        number=int(answer["id"]),
        kind=str(answer["model"]["type"]),
        usage=str(answer.get("usageControl") or "Download"),
        base_model=_base_model(answer),
        triggers=plain_words(answer.get("trainedWords") or ()),
        files=tuple(_file(file) for file in answer["files"]),
    )


def _file(file: Any) -> _File:
    metadata, hashes = file.get("metadata") or {}, file.get("hashes") or {}
    size = float(file.get("sizeKB") or 0) * 1024
    return _File(
        number=int(file["id"]),
        name=str(file["name"]),
        kind=str(file["type"]),
        primary=bool(file.get("primary")),
        metadata={key: str(metadata[key]) for key in _SELECTORS if metadata.get(key)},
        bytes=int(size) if size and size.is_integer() else None,
        sha256=hashes.get("SHA256") and str(hashes["SHA256"]).lower(),
    )


def _chosen(reference: CivitaiFile, version: _Version) -> _File:
    """The file of a version that the reference names, else the primary one. Raises SourceError."""
    if version.kind not in _LORAS:
        raise SourceError(f"{reference} is a {version.kind!r:.40}. Expected a LoRA.")
    if version.usage != "Download":
        raise SourceError(f"{reference} may be used on {AUTHORITY} only. Expected a LoRA that may be downloaded.")
    matching = [file for file in version.files if _matches(reference, file)]
    usable = [file for file in matching if file.kind == "Model" and file.metadata.get("format") == "SafeTensor"]
    chosen = [file for file in usable if file.primary] or usable
    if not chosen:
        raise SourceError(f"{reference} has no LoRA in safetensors: {_listed(version.files)}. Expected one.")
    if len(chosen) > 1:
        raise SourceError(f"{reference} has {_listed(chosen)}. Expected + and a file's number after the version's.")
    return chosen[0]


def _matches(reference: CivitaiFile, file: _File) -> bool:
    wanted = {"size": reference.size, "fp": reference.fp}
    same = all(file.metadata.get(key, "").lower() == value for key, value in wanted.items() if value)
    return same and reference.file in (None, file.number)


def _listed(files: Iterable[_File]) -> str:
    listed = [f"+{file.number} {file.name!r:.60} ({file.kind}, {file.metadata.get('format')})" for file in files]
    return ", ".join(listed[:MAX_LISTED]) or "no files"


def _download(version: _Version, file: _File, client: Client) -> Download:
    query = urlencode({"type": file.kind, **file.metadata})
    return Download(
        key=str(CivitaiFile(version.number, file=file.number)),
        name=file_name(file.name),
        url=f"{client.endpoint}/api/download/models/{version.number}?{query}",
        headers=client.headers,
        size=file.bytes,
        sha256=file.sha256,
        credential="Authorization" in client.headers,
        base_model=version.base_model,
        triggers=version.triggers,
    )


def _is_page(location: str | None, endpoint: str) -> bool:
    """Whether a download leads to a page of CivitAI's own, to log in or to join, and not to where files are kept."""
    parts = urlsplit(location or "")
    return parts.netloc == urlsplit(endpoint).netloc and not parts.path.startswith("/api/")
