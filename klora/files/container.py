"""A LoRA file as it lies on the disk: one safetensors file, by itself, in a trainer's tar or in a PEFT repository.

What its header says is held against bounds before any tensor is read. Knows nothing of layers and of spellings.
"""

import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from klora.errors import LoRAError
from klora.file_names import CONFIG, PEFT, WITHOUT_NAME, WORDS, lora_among

MAX_HEADER_BYTES = 10 << 20
MAX_BYTES = 2 << 30
MAX_TENSORS = 20_000
MAX_KEY = 256  # characters
MAX_JSON_BYTES = 1 << 20
MAX_MEMBERS = 10_000

FLOATS = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")
WHOLE = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")  # for an alpha

_BESIDE = {"embeddings.pti": "embeddings", "special_params.json": "words"}  # as cog-sdxl writes them
_TAUGHT = {"clip_l", "clip_g", "t5"}  # all that is in it


class Spec(NamedTuple):
    """What a header says of a tensor. dtype: as safetensors spells it, F16 or BF16."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """An open LoRA file: its header, and its tensors on demand.

    adapter: a PEFT repository's adapter_config.json. embeddings: a cog-sdxl tar's, or those beside the file, by their
    own keys; words: which words of a prompt they stand for, where that is said.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]
    reader: Any  # safetensors types its reader nowhere
    adapter: Mapping[str, Any]
    embeddings: Mapping[str, Tensor]
    words: Mapping[str, Any]

    def tensor(self, key: str) -> Tensor:
        """On the CPU, as stored."""
        return cast(Tensor, self.reader.get_tensor(key))


@contextmanager
def opened(path: Path | str) -> Iterator[Contents]:
    """The contents of a file, a tar or a folder. Raises LoRAError as in_words() does, also for what is wrong while they
    are used."""
    path = Path(path).absolute()  # for the name of "."
    with in_words(path), _found(path) as files, _reader(files["lora"]) as (specs, metadata, reader):
        embeddings: dict[str, Tensor] = {}
        if "embeddings" in files:
            with _reader(files["embeddings"]) as (names, _, tensors):
                embeddings = {name: tensors.get_tensor(name) for name in names}
        adapter, words = (_json(files[part]) if part in files else {} for part in ("adapter", "words"))
        yield Contents(specs, metadata, reader, adapter, embeddings, words)


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Raise what is wrong with a file as a LoRAError: always one sentence that begins with the file's name."""
    try:
        yield
    except LoRAError as error:
        raise LoRAError(f"{path.name} {error}") from error
    except (SafetensorError, OSError, tarfile.TarError) as error:
        why = getattr(error, "strerror", None) or error  # an OSError's own text names the folder
        raise LoRAError(f"{path.name} cannot be read ({why}). Expected a LoRA in a .safetensors file.") from error


@contextmanager
def _found(path: Path) -> Iterator[dict[str, Path]]:
    """The files that make up a LoRA, by part: "lora", and what may lie beside it."""
    if path.is_file() and _is_tar(path):
        with tempfile.TemporaryDirectory() as folder:
            try:
                files = _unpacked(path, Path(folder))
            except LoRAError:
                raise
            except (ValueError, RecursionError) as error:  # of extended headers
                raise LoRAError("is a tar with headers that cannot be read. Expected a trainer's.") from error
            yield files
    else:
        yield files_of(path)


def _is_tar(path: Path) -> bool:
    """By content: names tell nothing. Compressed ones are none: trainers write none, and bombs are."""
    with path.open("rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def files_of(path: Path) -> dict[str, Path]:
    """What a file, a tar or a repository is read from, by part: "lora", and what lies beside it: a PEFT repository's
    "adapter", "embeddings" of words. Raises LoRAError where a folder does not tell which."""
    file = path / _chosen("folder", [each.name for each in path.glob("*.safetensors")]) if path.is_dir() else path
    config, taught = file.with_name(CONFIG), [each for each in file.parent.glob(_emb(file.name)) if _teaches(each)]
    if len(taught) > 1:
        raise LoRAError(f"lies beside {taught[0].name!r} and {taught[1].name!r}. Expected the words of one LoRA.")
    stated = {"adapter": config} if file.name == PEFT and config.is_file() else {}
    return {"lora": file} | stated | ({"embeddings": taught[0]} if taught else {})


def _emb(lora: str) -> str:
    """The pattern of what files are called that hold the words of one of this name."""
    return ("*" if lora == WITHOUT_NAME else escape(lora.removesuffix(".safetensors"))) + WORDS


def _teaches(path: Path) -> bool:
    """Whether these are vectors of words; else it is a LoRA that is called so."""
    with _reader(path) as (specs, _, _):
        return specs.keys() <= _TAUGHT


def _chosen(kind: str, names: Sequence[str]) -> str:
    """Which of the files in a folder, or in a tar's, is the LoRA. Raises LoRAError."""
    if lora := lora_among(names):
        return lora
    raise LoRAError(f"cannot be read (a {kind} of {len(names)} .safetensors files). Expected one, or {WITHOUT_NAME}.")


def _unpacked(path: Path, folder: Path) -> dict[str, Path]:
    """Copies of a tar's members that matter, under names of ours: what a member is called is never a path."""
    found: dict[str, Path] = {}
    with tarfile.open(path, "r:") as tar:
        beside = _together([*_files(tar)])
        lora = _chosen("tar", [name for name in beside if name.endswith(".safetensors")])
        parts = {lora: "lora"} | _BESIDE | ({CONFIG: "adapter"} if lora == PEFT else {})
        parts |= {name: "embeddings" for name in beside if fnmatchcase(name, _emb(lora))}
        for name, member in ((name, member) for name, member in beside.items() if name in parts):
            found[parts[name]] = folder / ("lora.safetensors" if name == lora else name)
            with found[parts[name]].open("wb") as copy:
                shutil.copyfileobj(cast(IO[bytes], tar.extractfile(member)), copy)
    return found


def _files(tar: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """Its plain files by their paths, but for hidden ones: what macOS lays beside files ends as they do."""
    for number, member in enumerate(tar):
        if number == MAX_MEMBERS:
            raise LoRAError(f"is a tar of more than {MAX_MEMBERS} files. Expected a trainer's.")
        path = PurePosixPath(member.name)
        if member.isfile() and not member.issparse() and not path.name.startswith("."):
            yield path, member


def _together(files: Sequence[tuple[PurePosixPath, tarfile.TarInfo]]) -> dict[str, tarfile.TarInfo]:
    """{name: member} of the folder nearest to a tar's root that has weights: below it are checkpoints. Raises LoRAError
    where that is not one folder, or has a name twice."""
    places = {path.parent for path, _ in files if path.suffix == ".safetensors"}
    nearest = min((len(place.parts) for place in places), default=0)
    folders = sorted(place for place in places if len(place.parts) == nearest)
    if len(folders) > 1:
        raise LoRAError(f"is a tar with weights in {str(folders[0])!r} and in {str(folders[1])!r}. Expected one LoRA.")
    found: dict[str, tarfile.TarInfo] = {}
    for path, member in files:
        if path.parent in folders and found.setdefault(path.name, member) is not member:
            raise LoRAError(f"is a tar with {path.name!r} twice. Expected one.")
    return found


@contextmanager
def _reader(path: Path) -> Iterator[tuple[dict[str, Spec], dict[str, str], Any]]:
    """(specs, metadata, safetensors' reader) of a file whose header keeps within the bounds."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise LoRAError(
                f"cannot be read (its header would be {length} bytes long). Expected a LoRA in a .safetensors file, "
                f"with at most {MAX_HEADER_BYTES}."
            )
        if (count := file.read(length).count(b'"data_offsets"')) > MAX_TENSORS:
            raise LoRAError(f"holds {count} tensors. Expected at most {MAX_TENSORS}.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise LoRAError(f"is {size} bytes long. Expected at most {MAX_BYTES}.")
    with safe_open(path, framework="pt") as reader:
        keys = list(reader.keys())
        if len(keys) > MAX_TENSORS:  # whose names of fields were spelled otherwise
            raise LoRAError(f"holds {len(keys)} tensors. Expected at most {MAX_TENSORS}.")
        if odd := [key for key in keys if len(key) > MAX_KEY or not key.isprintable()]:
            raise LoRAError(f"holds a tensor named {odd[0][:40]!r}. Expected at most {MAX_KEY} printable characters.")
        slices = {key: reader.get_slice(key) for key in keys}
        specs = {key: Spec(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        yield specs, dict(reader.metadata() or {}), reader


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise LoRAError(f"has a {path.name} that cannot be read ({error}). Expected a JSON object.") from error
