"""A LoRA reference or a base's name -> a path on disk. The environment is read here only.

Knows nothing of torch, pipelines or the web form.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from klora.bases.hub import stay_offline as stay_offline
from klora.bases.install import ensure_base, setup_note
from klora.bases.pget import find_pget
from klora.bases.table import BASES as BASES
from klora.bases.table import base_of
from klora.cache import Borrowed, Library, Store
from klora.errors import BaseModelError, RequestError
from klora.sources.addresses import read_url
from klora.sources.authorities import Authorities
from klora.sources.deadline import Allowance as Allowance
from klora.sources.formats import check_structure
from klora.sources.kinds import Local
from klora.sources.local import lora_path, parsed, path_or_reference, pinned
from klora.sources.network import Network

logger = logging.getLogger(__name__)

FETCH_SECONDS = 300.0  # for all LoRAs of a request together
CACHE_GB, FREE_GB = 20.0, 2.0  # of the LoRA cache unless KLORA_CACHE_GB says otherwise; that the disk keeps for others
AUTHORITIES = {"hub": "HF_ENDPOINT", "civitai": "CIVITAI_ENDPOINT", "replicate": "REPLICATE_ENDPOINT"}
TOKENS = {"hf": "HF_TOKEN", "civitai": "CIVITAI_API_TOKEN", "replicate": "REPLICATE_API_TOKEN"}
PLACE = re.compile(r"(\[[\da-f:]+\]|[^\s:/@\[\]]+):[1-9]\d{0,4}")  # as Target.place
TOYS = Path(__file__).resolve().parent / "examples" / "toy"  # not there where klora is installed as a package


class Installed(NamedTuple):
    """A base model on disk. family: a key of klora.models.FAMILIES; path: its diffusers-format folder."""

    name: str
    family: str
    path: Path


def models_folder() -> Path:
    """KLORA_MODELS, else ~/.cache/klora/models: one folder a base."""
    return _own_folder("KLORA_MODELS", "models")


def _own_folder(setting: str, name: str) -> Path:
    """The one that a setting names, else ~/.cache/klora/name. Raises RequestError."""
    try:
        return Path(os.environ.get(setting) or Path.home() / ".cache" / "klora" / name)
    except RuntimeError as error:  # as of a user whom the machine does not know, without HOME
        raise RequestError(f"There is no home folder, and {setting} is not set. Expected it to be.") from error


def use_toys_if_no_bases(toys: Path = TOYS) -> None:
    """Make the toy bases the installed ones, and say so, where KLORA_MODELS is unset and no base is installed.

    Unless KLORA_LORA_ROOT is set, requests may then name the toys' LoRA files.  For programs that people start by hand;
    predict.py never calls it, for a container without its bases must not serve toys.
    """
    if os.environ.get("KLORA_MODELS") or installed_bases() or not _bases_in(toys):
        return
    os.environ["KLORA_MODELS"] = str(toys)
    os.environ["KLORA_LORA_ROOT"] = os.environ.get("KLORA_LORA_ROOT") or str(toys / "loras")
    logger.warning(
        "No base models in ~/.cache/klora/models: using the toy ones in examples/toy (pictures of shapes). "
        "Set KLORA_MODELS for real ones."
    )


def installed_bases() -> list[str]:
    """The bases whose folders are there, in the order of the table. Raises BaseModelError."""
    return _bases_in(models_folder())


def _bases_in(folder: Path) -> list[str]:
    try:
        return [name for name, base in BASES.items() if base.family and (folder / name / "model_index.json").is_file()]
    except OSError as error:
        raise BaseModelError(
            f"The folder of base models is {folder.absolute()}, which cannot be read: {error.strerror}. "
            "Expected KLORA_MODELS to name one that can."
        ) from error


def resident_bases() -> list[Installed]:
    """The bases to load at set-up: KLORA_BASES, separated by commas, else every installed one. Raises BaseModelError.

    Fetches what is missing of KLORA_BASES; without it, the bases that the build left to set-up, and if one of these
    cannot be had, only logs why.  That no base is installed is an error: such a server could answer nothing.
    """
    named = _named_bases()
    for name in named:
        _candidates(name)  # before the others are fetched, which takes long
    for name in named or BASES:
        try:
            _fetch_if_due(name)
        except BaseModelError as error:
            if named:
                raise
            logger.warning("%s", error)
    return [find_base(name) for name in named or installed_bases()] or [find_base(None)]


def _named_bases() -> list[str]:
    return [name.strip() for name in os.environ.get("KLORA_BASES", "").split(",") if name.strip()]


def _fetch_if_due(name: str) -> None:
    """Fetch a base that is missing, though KLORA_BASES names it or the build left it to set-up, with HF_TOKEN. Raises
    BaseModelError."""
    due = name in _named_bases() or setup_note(models_folder(), name).is_file()
    if due and name not in installed_bases():
        logger.info("%s is not in %s: fetching it", name, models_folder())
        download_base(name, token=os.environ.get(TOKENS["hf"]) or None)


def find_base(name: str | None, family: str | None = None, preferred: str = "") -> Installed:
    """The base of this name; without one, an installed base of the family, or of any: the preferred one if it is among
    these, else the first. Raises BaseModelError."""
    candidates, installed = _candidates(name, family), installed_bases()
    chosen = next((base for base in (preferred, *candidates) if base in candidates and base in installed), None)
    if chosen is None:
        what = name or (f"A base model for {family} LoRAs" if family else "A base model")
        raise BaseModelError(f"{what} is not installed: {_lack_of(list(candidates), installed)}")
    return Installed(chosen, candidates[chosen], models_folder() / chosen)


def _candidates(name: str | None, family: str | None = None) -> dict[str, str]:
    """{base: its family} of those that find_base() may choose from, installed or not. Raises BaseModelError."""
    known = {base: facts.family for base, facts in BASES.items() if facts.family}
    wanted = {base: own for base, own in known.items() if name == base or (name is None and family in (None, own))}
    if not wanted:
        raise BaseModelError(f"There is no base model {name!r}. Expected one of {', '.join(known)}.")
    return wanted


def _lack_of(wanted: list[str], installed: list[str]) -> str:
    """What is in the folder of base models instead of one of the wanted, and how it gets there."""
    folder = models_folder().absolute()
    seen = f"{folder} has {', '.join(installed) or 'no base model'}" if folder.is_dir() else f"{folder} is no folder"
    places = " or ".join(f"{BASES[name].repository} in {folder / name}" for name in wanted)
    return (
        f"{seen}. Expected {places}, as script/download-weights {wanted[0]} fetches it, or KLORA_MODELS set to another "
        "folder of base models; script/make-toy-bases makes toy ones in examples/toy."
    )


def training_base(name: str) -> dict[str, Any]:
    """The base of this name, by the fields of klora.training.job.TrainingBase. Raises BaseModelError.

    One that set-up would have fetched is fetched: a trainer has no set-up.
    """
    _fetch_if_due(name)
    installed, base = find_base(name)._asdict(), BASES[name]
    origin = {"repository": base.repository, "checkpoint": base.checkpoint, "licence": base.licence}
    return installed | origin | {"annotators": models_folder()}


def safety_checker_path() -> Path:
    """The folder of the safety checker, whether or not it is there."""
    return models_folder() / "safety-checker"


def lora_root() -> Path | None:
    """KLORA_LORA_ROOT: the one folder from which requests may name local LoRA files. None, the default: none may."""
    root = os.environ.get("KLORA_LORA_ROOT")
    return Path(root) if root else None


class LoRAFiles:
    """The LoRA files that requests name: below one folder of the server's, or anywhere, and then lent by the cache.

    root: the folder of local files; None takes no local path.  anywhere: take the path of any file, for programs whose
    user owns the machine.  Raises KLoRAError where a setting of the cache or of the authorities is wrong.
    """

    def __init__(self, root: Path | None = None, *, anywhere: bool = False) -> None:
        self._root, self._anywhere = root, anywhere
        self._authorities, self._cache_bytes = _authorities(), cache_bytes()

    @cached_property
    def _library(self) -> Library:  # made when first needed: a server of local files does without a cache
        store = Store(cache_folder(), self._cache_bytes, int(FREE_GB * 1e9))
        return Library(store, self._authorities.resolve, self._authorities.fetch, check_structure)

    @contextmanager
    def borrowed(
        self,
        references: Mapping[str, str],
        tokens: Mapping[str, str],
        bases: Sequence[str] = (),
        allowance: Allowance | None = None,
    ) -> Iterator[dict[str, Borrowed]]:
        """The file of each reference by its input, there until the end of the block. Raises KLoRAError.

        tokens: the user's, by authority, "hf", "civitai" and "replicate".  bases: that the request can run; what its
        authority says is for none of them is refused before it is fetched. Without any nothing is.  allowance: of a
        request that borrows several times; None: FETCH_SECONDS for this time.
        """
        parse = path_or_reference if self._anywhere else parsed
        kinds = {name: parse(name, text) for name, text in references.items()}
        local = {name: one for name, one in kinds.items() if isinstance(one, Local)}
        files = {name: Borrowed(pinned(self._path(name, one), one, name)) for name, one in local.items()}
        remote = {name: one for name, one in kinds.items() if name not in local}
        if not remote:
            yield files
            return
        families = {name: family for name in bases if (family := BASES[name].family)}
        with ExitStack() as loans:
            with (allowance or Allowance(FETCH_SECONDS)).deadline() as deadline:
                files |= loans.enter_context(self._library.borrowed(remote, tokens, deadline, families))
            yield {name: files[name] for name in references}

    def _path(self, name: str, reference: Local) -> Path:
        return Path(reference.path) if self._anywhere else lora_path(reference.path, self._root, name)


def runnable(model: str | None) -> list[str]:
    """The bases that a request may come to: the one that it names, else every installed one. Raises BaseModelError."""
    return [find_base(model).name] if model else installed_bases()


def cache_folder() -> Path:
    """KLORA_CACHE, else ~/.cache/klora/loras: the folder of fetched LoRAs."""
    return _own_folder("KLORA_CACHE", "loras")


def cache_bytes() -> int:
    """KLORA_CACHE_GB, else CACHE_GB, in bytes. Raises RequestError."""
    text = os.environ.get("KLORA_CACHE_GB") or str(CACHE_GB)
    try:
        size = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise RequestError(f"KLORA_CACHE_GB is {text!r}. Expected the size of the LoRA cache in gigabytes, as in 20.")
    return size


def compiled_blocks() -> Literal["own", "float8"] | None:
    """KLORA_COMPILE, as a Studio takes it: 0, the default, is None, 1 "own", float8 itself. Raises RequestError."""
    kinds: dict[str, Literal["own", "float8"] | None] = {"0": None, "1": "own", "float8": "float8"}
    if (text := os.environ.get("KLORA_COMPILE") or "0") not in kinds:
        raise RequestError(f"KLORA_COMPILE is {text!r}. Expected 1 to compile the bases' blocks, or float8, or 0.")
    return kinds[text]


def own_tokens() -> dict[str, str]:
    """The machine's own tokens, by authority, from HF_TOKEN, CIVITAI_API_TOKEN and REPLICATE_API_TOKEN.

    For the `klora` command, whose user they belong to; a server never lends them to requests.
    """
    return {authority: os.environ[name] for authority, name in TOKENS.items() if os.environ.get(name)}


def _authorities() -> Authorities:
    """At their own addresses, or where HF_ENDPOINT, CIVITAI_ENDPOINT and REPLICATE_ENDPOINT say. These, and every
    "host:port" in KLORA_TRUSTED_HOSTS, separated by commas, may be http or private. Raises KLoRAError, without any of
    them, for they may be inside the operator's or have a password."""
    named: dict[str, Any] = {name: url.rstrip("/") for name, key in AUTHORITIES.items() if (url := os.environ.get(key))}
    hosts = {read_url(url, AUTHORITIES[name]).place for name, url in named.items()}
    return replace(Authorities(network=Network(frozenset(hosts | _trusted_hosts()))), **named)


def _trusted_hosts() -> set[str]:
    hosts = {host for text in os.environ.get("KLORA_TRUSTED_HOSTS", "").split(",") if (host := text.strip().lower())}
    if not all(PLACE.fullmatch(host) for host in hosts):
        raise RequestError("KLORA_TRUSTED_HOSTS has one that is not host:port. Expected its port, as in 10.0.0.1:80.")
    return hosts


def download_base(name: str, folder: Path | None = None, token: str | None = None) -> Path:
    """Fetch what folder/name lacks of a base, and return that folder. Raises BaseModelError. KLORA_PGET_SHA256: of the
    pget that may fetch what is public; unset, none does."""
    base, pget = base_of(name), find_pget(os.environ.get("KLORA_PGET_SHA256"))
    return ensure_base(name, base, folder or models_folder(), token, pget)
