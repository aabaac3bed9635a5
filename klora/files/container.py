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

_COG_SDXL = {"embeddings.pti": "embeddings", "special_params.json": "words"}  # {file in its tar: part of a LoRA}
_WORD_KEYS = {"clip_l", "clip_g", "t5"}  # all that a file of words has


class Spec(NamedTuple):
    """What a header says of a tensor. dtype: as safetensors spells it, F16 or BF16."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """An open LoRA file: its header, and its tensors on demand.

    adapter: a PEFT repository's adapter_config.json.   embeddings: of words, from a cog-sdxl tar or a file beside this
    one, by their keys there.   words: {word of a prompt: "<s0><s1>", the embeddings it stands for}, {} where no file
    says so.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]
    reader: Any  # safetensors types its reader nowhere
    adapter: Mapping[str, Any]
    embeddings: Mapping[str, Tensor]
    words: Mapping[str, Any]

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU, in the dtype that it is stored in."""
        return cast(Tensor, self.reader.get_tensor(key))


@contextmanager
def opened(path: Path | str) -> Iterator[Contents]:
    """The contents of a file, a tar or a folder. Raises LoRAError as in_words() does, also for what goes wrong in the
    block."""
    path = Path(path).absolute()  # for the name of "."
    with in_words(path), _parts(path) as files, _reader(files["lora"]) as (specs, metadata, reader):
        embeddings: dict[str, Tensor] = {}
        if "embeddings" in files:
            with _reader(files["embeddings"]) as (names, _, tensors):
                embeddings = {name: tensors.get_tensor(name) for name in names}
        adapter, words = (_json(files[part]) if part in files else {} for part in ("adapter", "words"))
        yield Contents(specs, metadata, reader, adapter, embeddings, words)


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Have every error of reading a file raised as a LoRAError, of which the sentence begins with the file's name."""
    try:
        yield
    except LoRAError as error:
        raise LoRAError(f"{path.name} {error}") from error
    except (SafetensorError, OSError, tarfile.TarError) as error:
        why = getattr(error, "strerror", None) or error  # an OSError's own text names the folder
        raise LoRAError(f"{path.name} cannot be read ({why}). Expected a LoRA in a .safetensors file.") from error


@contextmanager
def _parts(path: Path) -> Iterator[dict[str, Path]]:
    """files_of(), of a tar after it was unpacked into a folder that is gone at the end of the block."""
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
    """Whether it is a plain tar, by content and not by name. Compressed ones are refused: no trainer writes them, and
    they may unpack to any size."""
    with path.open("rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def files_of(path: Path) -> dict[str, Path]:
    """{part: file} of all files that a LoRA at a path is read from: "lora", a tar as it is; and beside that "adapter",
    a PEFT repository's config, and "embeddings" of words. Raises LoRAError where a folder does not tell which."""
    file = path / _chosen("folder", [each.name for each in path.glob("*.safetensors")]) if path.is_dir() else path
    config, words = file.with_name(CONFIG), [each for each in file.parent.glob(_words_of(file.name)) if _teaches(each)]
    if len(words) > 1:
        raise LoRAError(f"lies beside {words[0].name!r} and {words[1].name!r}. Expected the words of one LoRA.")
    adapter = {"adapter": config} if file.name == PEFT and config.is_file() else {}
    return {"lora": file} | adapter | ({"embeddings": words[0]} if words else {})


def _words_of(lora: str) -> str:
    """The glob pattern of names that a file of words may have beside a LoRA of this name."""
    return ("*" if lora == WITHOUT_NAME else escape(lora.removesuffix(".safetensors"))) + WORDS


def _teaches(path: Path) -> bool:
    """Whether a file holds embeddings of words; else it is a LoRA with such a name."""
    with _reader(path) as (specs, _, _):
        return specs.keys() <= _WORD_KEYS


def _chosen(kind: str, names: Sequence[str]) -> str:
    """The name that is the LoRA's, of the .safetensors files in one folder. kind: "folder" or "tar", for the message.
    Raises LoRAError."""
    if lora := lora_among(names):
        return lora
    raise LoRAError(f"cannot be read (a {kind} of {len(names)} .safetensors files). Expected one, or {WITHOUT_NAME}.")


def _unpacked(path: Path, folder: Path) -> dict[str, Path]:
    """{part: copy in folder} of the members that are read, under our own names: a member's name is never used as a
    path."""
    copies: dict[str, Path] = {}
    with tarfile.open(path, "r:") as tar:
        beside = _top_folder([*_plain_members(tar)])
        lora = _chosen("tar", [name for name in beside if name.endswith(".safetensors")])
        parts = {lora: "lora"} | _COG_SDXL | ({CONFIG: "adapter"} if lora == PEFT else {})
        parts |= {name: "embeddings" for name in beside if fnmatchcase(name, _words_of(lora))}
        for name, member in ((name, member) for name, member in beside.items() if name in parts):
            copies[parts[name]] = folder / ("lora.safetensors" if name == lora else name)
            with copies[parts[name]].open("wb") as copy:
                shutil.copyfileobj(cast(IO[bytes], tar.extractfile(member)), copy)
    return copies


def _plain_members(tar: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """(path, member) of each regular file that is not hidden: macOS adds hidden ones with the same suffixes."""
    for number, member in enumerate(tar):
        if number == MAX_MEMBERS:
            raise LoRAError(f"is a tar of more than {MAX_MEMBERS} files. Expected a trainer's.")
        path = PurePosixPath(member.name)
        if member.isfile() and not member.issparse() and not path.name.startswith("."):
            yield path, member


def _top_folder(files: Sequence[tuple[PurePosixPath, tarfile.TarInfo]]) -> dict[str, tarfile.TarInfo]:
    """{name: member} in the folder with weights that is nearest to the root: those deeper down are checkpoints. Raises
    LoRAError where several are as near, or a name is there twice."""
    with_weights = {path.parent for path, _ in files if path.suffix == ".safetensors"}
    depth = min((len(folder.parts) for folder in with_weights), default=0)
    folders = sorted(folder for folder in with_weights if len(folder.parts) == depth)
    if len(folders) > 1:
        raise LoRAError(f"is a tar with weights in {str(folders[0])!r} and in {str(folders[1])!r}. Expected one LoRA.")
    found: dict[str, tarfile.TarInfo] = {}
    for path, member in files:
        if path.parent in folders and found.setdefault(path.name, member) is not member:
            raise LoRAError(f"is a tar with {path.name!r} twice. Expected one.")
    return found


@contextmanager
def _reader(path: Path) -> Iterator[tuple[dict[str, Spec], dict[str, str], Any]]:
    """(specs, metadata, safetensors' reader) of a file. Raises LoRAError where its header exceeds the bounds above."""
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
