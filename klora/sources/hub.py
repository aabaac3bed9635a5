"""A Hugging Face reference -> downloads. One question to the hub, a second where the repository is gated.

The hub is asked as network.py asks and not by huggingface_hub: its HTTP client ends at no deadline, is turned off by
HF_HUB_OFFLINE, and would use this machine's own token unless told not to in every call.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from klora.errors import SourceError
from klora.file_names import CONFIG, PEFT, WITHOUT_NAME, WORDS, lora_among
from klora.sources.authority import Client, bearer, file_name, plain_words, understood
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound
from klora.sources.kinds import HubFile
from klora.sources.network import Network

AUTHORITY = "Hugging Face"
MAX_LISTED = 20  # names, in a message


class _File(NamedTuple):
    """size: in bytes.  sha256: of what is in large file storage, as weights are."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class _Repository:
    """A repository at a commit. files: by path."""

    commit: str
    files: Mapping[str, _File]
    gated: bool
    base_model: str | None
    triggers: tuple[str, ...]


def resolve(
    reference: HubFile, token: str | None, endpoint: str, net: Network, deadline: Deadline
) -> tuple[Download, ...]:
    """The LoRA of a repository at its present commit; after it its adapter_config.json, where it is PEFT's, or what
    it teaches of words.

    token: the user's; without one nobody's is used. Raises NotFound, Denied, Unreachable, and SourceError where the
    repository does not tell which file it is.
    """
    client = Client(endpoint, bearer(token, AUTHORITY), net, deadline)
    repository = _repository(reference, client)
    path = _chosen(reference, list(repository.files))
    names = {path: file_name(path)}
    beside = str(PurePosixPath(path).with_name(CONFIG))
    if PurePosixPath(path).name == PEFT and beside in repository.files:
        names[beside] = CONFIG
    if words := _words(reference.repository, PurePosixPath(path), repository.files):
        # Cut to the same stem as the name of its words, by which these are known to be its own.
        names = {path: names[path][-76:].lstrip(".-"), words: file_name(words)}
    return tuple(_download(reference, repository, path, name, client) for path, name in names.items())


def _words(repository: str, lora: PurePosixPath, paths: Iterable[str]) -> str | None:
    """The path of the file of words that a LoRA teaches, None without one: in its folder, under its name. Beside a LoRA
    that is called WITHOUT_NAME also the only such file under any name, or of several the one with the repository's."""
    beside = [path for path in map(PurePosixPath, paths) if path.parent == lora.parent and path.name.endswith(WORDS)]
    names = {f"{lora.stem}{WORDS}"}
    if lora.name == WITHOUT_NAME:
        names |= {beside[0].name} if len(beside) == 1 else {f"{repository.partition('/')[2]}{WORDS}"}
    return next((str(path) for path in beside if path.name in names), None)


def _repository(reference: HubFile, client: Client) -> _Repository:
    """What the hub says of a reference's repository. Raises Denied also where it only withholds the files."""
    api = f"{client.endpoint}/api/models/{reference.repository}"
    try:
        answer = client.json(f"{api}/revision/{quote(reference.revision, safe='')}?blobs=true")
        with understood(AUTHORITY):
            repository = _read(answer)
        if repository.gated:  # of which anybody may read the list, and not anybody the files
            client.check_access(f"{api}/auth-check")
    except NotFound:
        raise NotFound(
            f"{reference} is not on {AUTHORITY}, or not at this revision. Expected hf:owner/name[@revision][/path]."
        ) from None
    except Denied:
        raise Denied(_denial(reference, bool(client.headers))) from None
    return repository


def _denial(reference: HubFile, credential: bool) -> str:
    seen = "the token that was given may not read it" if credential else "no token was given"
    return (
        f"{reference} is private or gated, or there is no such repository, and {seen}. Expected a {AUTHORITY} token of "
        f"somebody who may read it and, where it is gated, has accepted the licence at "
        f"huggingface.co/{reference.repository}."
    )


def _read(answer: Any) -> _Repository:
    card = answer.get("cardData")
    return _Repository(
        commit=_commit(answer["sha"]),
        files={str(file["rfilename"]): _file(file) for file in answer["siblings"]},
        gated=bool(answer.get("gated")),
        base_model=next(iter(plain_words(_texts(card, "base_model"))), None),
        triggers=plain_words((*_texts(card, "instance_prompt"), *_texts(card, "trigger"))),
    )


def _texts(card: Any, key: str) -> Iterator[str]:
    """The texts under a key of a model card, one or several. Authors write cards: anything may be in them."""
    value = card.get(key) if isinstance(card, dict) else None
    yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text)


def _commit(sha: str) -> str:
    if not re.fullmatch("[0-9a-f]{40}", sha):
        raise ValueError("no commit")
    return sha


def _file(sibling: Any) -> _File:
    size, stored = sibling.get("size"), sibling.get("lfs") or {}
    return _File(None if size is None else int(size), stored.get("sha256"))


def _chosen(reference: HubFile, paths: list[str]) -> str:
    """The path of the LoRA in the repository. Raises NotFound where there is none, SourceError where it may be one of
    several."""
    if reference.path in paths:
        return reference.path
    weights = [path for path in paths if path.endswith(".safetensors")]
    folder = PurePosixPath(reference.path)
    inside = {PurePosixPath(path).name: path for path in weights if PurePosixPath(path).parent == folder}
    if lora := lora_among(inside):
        return inside[lora]
    if not inside:
        raise NotFound(
            f"{reference} has no .safetensors file; in its repository there is {_listed(weights)}. "
            "Expected one, in safetensors: pickles are never read."
        )
    raise SourceError(
        f"{reference} has {len(inside)} files: {_listed(inside.values())}. "
        "Expected the path of one after it, as in hf:owner/name/file.safetensors."
    )


def _listed(paths: Iterable[str]) -> str:
    names = sorted(paths)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(repr(name[:100]) for name in names[:MAX_LISTED]) + more or "none"


def _download(reference: HubFile, repository: _Repository, path: str, name: str, client: Client) -> Download:
    file = repository.files[path]
    return Download(
        key=str(HubFile(reference.repository, repository.commit, path)),
        name=name,
        url=f"{client.endpoint}/{reference.repository}/resolve/{repository.commit}/{quote(path)}",
        headers=client.headers,
        size=file.size,
        sha256=file.sha256,
        credential=bool(client.headers),
        base_model=repository.base_model,
        triggers=repository.triggers,
    )
