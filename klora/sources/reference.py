"""One grammar for whatever names a LoRA: text -> Reference. Looks nothing up and opens nothing.

hf:owner/name[@revision][/path]   hf://...   a page or file of huggingface.co or hf.co   huggingface.co/owner/name/path
civitai:<version>[+<file>]   an AIR   a model page or download link of civitai.com, .green or .red
replicate:owner/name[:version]   owner/name:version   a page of replicate.com
owner/name   https://...   data:...;base64,...   path/in/the/folder.safetensors   ./any/path
Each of them may end in #sha256=<64 hex digits>.
"""

import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, unquote

from klora.errors import SourceError
from klora.sources.formats import EXPECTED, HEAD_BYTES, unlike_lora
from klora.sources.kinds import Bare, CivitaiFile, Data, HubFile, Local, Reference, ReplicateModel, plain_path
from klora.sources.urls import begins_with_an_authority, split, url

MAX_CHARACTERS = 2000
MAX_DATA_CHARACTERS = 64 << 20

# Hugging Face's, Replicate's and CivitAI's, which people paste into the wrong field.
_TOKEN = re.compile(r"(?<![A-Za-z0-9_])(?:hf|r8)_\w+|[0-9a-fA-F]{32,}")
# Where an @ ends no user name: after one of our schemes, or after owner/name.
_WITH_REVISION = re.compile(r"(?:hf|civitai|replicate|urn|air):|[\w.-]+/[\w.-]+@", re.ASCII | re.IGNORECASE)

_FORMS = (
    "hf:owner/name, civitai:<version>, replicate:owner/name, owner/name, an https address, a data URI or the path of a "
    ".safetensors file"
)
# Of the hub's pages: no owners of models.
_TAKEN = ("datasets", "spaces", "buckets", "collections", "models", "api", "docs", "papers", "blog")

_REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
_HUB = re.compile(rf"(?P<repository>[^/@]+/[^/@]+)(?:@{_REVISION})?(?P<path>/.*)?")
_HUB_PAGE = re.compile(rf"/(?P<repository>[^/]+/[^/]+)(?:/(?:blob|resolve|raw|tree|blame)/{_REVISION})?(?P<path>/.*)?")
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_GIT_NAME = re.compile(r"(?!.*(?:\.\.|//))[A-Za-z0-9_][\w.+/-]*", re.ASCII)

_ID = r"[0-9]{1,12}"
_CIVITAI = re.compile(
    rf"(?:models/(?P<model>{_ID})|(?:{_ID}@)?(?P<version>{_ID}))(?:\+(?P<file>{_ID}))?(?:\?(?P<query>.*))?"
)
_CIVITAI_PAGE = re.compile(
    rf"(?:/api/v1)?/models/(?P<model>{_ID})(?:/.*)?|(?:/api/download/models|(?:/api/v1)?/model-versions)/(?P<version>{_ID})/*"
)
_AIR = re.compile(
    rf"(?:urn:)?(?:air:)?[\w-]+:(?P<type>\w+):civitai:(?P<model>{_ID})(?:@(?P<version>{_ID}))?(?:\+(?P<file>{_ID}))?"
    r"(?P<suffix>\.\w+)?",
    re.ASCII | re.IGNORECASE,
)
_LORAS = ("lora", "lycoris", "locon", "dora")

_MODEL = re.compile(
    r"(?P<model>\w[\w-]*/\w[\w.-]*?)(?::(?P<a>[0-9A-Za-z]{1,64})|/versions/(?P<b>[0-9A-Za-z]{1,64})|/(?P<c>[0-9a-f]{64}))?"
    r"(?P<weights>/_weights)?/*",
    re.ASCII,
)


def parse(text: str) -> Reference:
    """What a text refers to. Raises SourceError, of which the sentence repeats no secret."""
    text = text.strip()
    try:
        body, mark, fragment = _bounded(text).partition("#")
        pin = re.fullmatch("sha256=([0-9a-f]{64})", fragment.lower())
        if mark and not pin:
            raise SourceError("what follows its # is no sha256. Expected nothing there, or #sha256= and 64 hex digits.")
        reference = replace(_read(body), pin=pin and pin[1])
        if isinstance(reference, Data) and reference.pin not in (None, reference.sha256):
            raise SourceError("its sha256 is not the one after its #. Expected the file that was pinned.")
        return reference
    except SourceError as error:
        raise SourceError(f"{shown(text)} cannot be used: {error}") from None


def shown(text: str) -> str:
    """A reference as messages may repeat it: without query, user name, payload and tokens, at most 80 characters."""
    if _is_data(text):
        return "'data:...'"
    text = re.split("[?#]", text, maxsplit=1)[0]
    if not _WITH_REVISION.match(text):
        text = text.rpartition("@")[2]
    text = _TOKEN.sub("...", text)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _bounded(text: str) -> str:
    most = MAX_DATA_CHARACTERS if _is_data(text) else MAX_CHARACTERS
    if len(text) > most:
        raise SourceError(f"it is {len(text)} characters long. Expected at most {most}.")
    if not _is_data(text) and ("\\" in text or not text.isprintable()):
        raise SourceError("it has a backslash or a control character in it. Expected plain characters.")
    return text


def _is_data(text: str) -> bool:
    return text[:5].lower() == "data:"


def _read(text: str) -> Reference:
    if begins_with_an_authority(text):
        return _web(f"https://{text}")
    scheme, colon, rest = text.partition(":")
    if colon and scheme.lower() in _SCHEMES:
        return _SCHEMES[scheme.lower()](rest)
    if air := _AIR.fullmatch(text):
        return _air(air)
    return _name_or_path(text)


def _web(text: str) -> Reference:
    parts = split(text)
    page = _PAGES.get((parts.hostname or "").removeprefix("www."))
    return page(parts.path, parts.query) if page else url(parts)


# Hugging Face.


def _hub(text: str) -> HubFile:
    match = _HUB.fullmatch(text.removeprefix("//"))
    if match is None:
        raise SourceError("it names no model repository. Expected hf:owner/name[@revision][/path].")
    return _hub_file(match)


def _hub_page(path: str, query: str) -> HubFile:
    match = _HUB_PAGE.fullmatch(path)
    below = ((match and match["path"]) or "").strip("/")
    # owner/name/file.safetensors is no page of the hub, but a form that flux-dev-lora takes.
    if match is None or (below and not match["revision"] and not below.lower().endswith(".safetensors")):
        raise SourceError("it is no page of a model's files. Expected huggingface.co/owner/name[/blob/revision/path].")
    file = dict(parse_qsl(query)).get("show_file_info")  # of which the page tells in a window over itself
    return replace(_hub_file(match), path=plain_path(file)) if file else _hub_file(match)


def _hub_file(match: re.Match[str]) -> HubFile:
    owner, name = match["repository"].split("/")
    if owner in _TAKEN:
        raise SourceError(f"it is of the hub's {owner}. Expected a model repository, owner/name.")
    if not (_HUB_NAME.fullmatch(owner) and _HUB_NAME.fullmatch(name)):
        raise SourceError("its repository has a name that none can have. Expected owner/name.")
    revision = unquote(match["revision"] or "main")
    if not _GIT_NAME.fullmatch(revision):
        raise SourceError("its revision is none. Expected a branch, a tag or a commit.")
    return HubFile(f"{owner}/{name}", revision, plain_path(unquote(match["path"] or "")))


# CivitAI.


def _civitai(text: str) -> CivitaiFile:
    match = _CIVITAI.fullmatch(text)
    if match is None:
        raise SourceError("it has no number of a version. Expected civitai:<version>[+<file>], or the model's page.")
    return _civitai_file(match["model"], match["version"], match["file"], match["query"] or "")


def _civitai_page(path: str, query: str) -> CivitaiFile:
    match = _CIVITAI_PAGE.fullmatch(path)
    if match is None:
        raise SourceError("it is no model's page. Expected civitai.com/models/<model>?modelVersionId=<version>.")
    return _civitai_file(match["model"], match["version"], None, query)


def _air(match: re.Match[str]) -> CivitaiFile:
    if match["type"].lower() not in _LORAS:
        raise SourceError(f"it is an AIR of type {match['type'][:20]}. Expected one of {', '.join(_LORAS)}.")
    plain_path(match["suffix"] or "")
    return _civitai_file(match["model"], match["version"], match["file"], "")


def _civitai_file(model: str | None, version: str | None, file: str | None, query: str) -> CivitaiFile:
    """query: a page's modelVersionId, or what a download link says of the file."""
    options = dict(parse_qsl(query))
    if {"token", "api_key"} & {name.lower() for name in options}:
        raise SourceError("it has a token in it. Expected the link without, and the token in the input for tokens.")
    if (options.get("type", "Model"), options.get("format", "SafeTensor")) != ("Model", "SafeTensor"):
        raise SourceError("it asks for another type or format. Expected type=Model and format=SafeTensor.")
    version, file = version or options.get("modelVersionId"), file or options.get("fileId")
    size, fp = (options.get(key, "").lower() or None for key in ("size", "fp"))
    if not all(re.fullmatch(_ID, number) for number in (version, file) if number):
        raise SourceError("its version or its file is no number. Expected modelVersionId=<version>.")
    if not all(re.fullmatch("[0-9a-z_]{1,16}", word) for word in (size, fp) if word):
        raise SourceError("its size or its fp is no word. Expected size=pruned, fp=fp16 and the like.")
    known = int(version) if version else None
    return CivitaiFile(known, int(model or 0) if known is None else None, int(file) if file else None, size, fp)


# Replicate.


def _replicate(text: str) -> ReplicateModel:
    match = _MODEL.fullmatch(text)
    if match is None:
        raise SourceError("it names no model. Expected replicate:owner/name[:version].")
    return ReplicateModel(match["model"], match["a"] or match["b"] or match["c"])


def _replicate_page(path: str, query: str) -> ReplicateModel:
    return _replicate(path.removeprefix("/"))


# What stands for itself.


def _name_or_path(text: str) -> Reference:
    if text.startswith("./"):
        return _local(text)
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", text):
        raise SourceError(f"its scheme is {scheme[0][:20]}. Expected {_FORMS}.")
    if text.lower().endswith((".safetensors", ".tar")):
        return _local(text)
    plain_path(text)
    match = _MODEL.fullmatch(text)
    if match is None:
        raise SourceError(f"it is none of the forms there are. Expected {_FORMS}.")
    versioned = match["a"] or match["b"] or match["c"] or match["weights"]
    return _replicate(text) if versioned else Bare(match["model"])


def _local(text: str) -> Local:
    if text.startswith(("/", "~")):
        raise SourceError("its path is not relative. Expected one in the server's LoRA folder.")
    return Local(plain_path(PurePosixPath(text).as_posix()))


def _data(text: str) -> Data:
    head, comma, encoded = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise SourceError("it is not in base64. Expected data:application/octet-stream;base64,...")
    try:
        payload = b64decode(encoded, validate=True)
    except ValueError:
        raise SourceError("its base64 is damaged. Expected A-Z, a-z, 0-9, +, / and = at the end.") from None
    if kind := unlike_lora(payload[:HEAD_BYTES]):
        raise SourceError(f"it looks like {kind}. {EXPECTED}")
    return Data(sha256(payload).hexdigest(), payload)


_SCHEMES: Mapping[str, Callable[[str], Reference]] = {
    "https": lambda rest: _web(f"https:{rest}"),
    "http": lambda rest: _web(f"http:{rest}"),
    "hf": _hub,
    "civitai": _civitai,
    "replicate": _replicate,
    "data": _data,
}
_PAGES: Mapping[str, Callable[[str, str], Reference]] = {
    **dict.fromkeys(("huggingface.co", "hf.co"), _hub_page),
    **dict.fromkeys(("civitai.com", "civitai.green", "civitai.red"), _civitai_page),
    "replicate.com": _replicate_page,
}
