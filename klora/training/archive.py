"""From an upload to {name: bytes}, within limits. Knows nothing of images and captions.

An upload is a folder, a zip, a tar or a tar.gz, by its content. Members are read as counted streams; their names are
labels, never places to write to. A tar inside (a WebDataset shard) and a parquet file are read as folders of their
names: row 7 of a.parquet becomes a.parquet/000007 with its caption in a.parquet/000007.txt.
"""

import gzip
import importlib
import io
import posixpath
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from klora.errors import RequestError

FREE_BYTES = 16 << 20  # to which any upload may unpack, whatever Limits.ratio is
CLUTTER = ("thumbs.db", "desktop.ini")
CAPTION_KEYS = ("caption", "text", "prompt")
# What zipfile, tarfile and gzip raise for damaged files; ValueError is tarfile's, for numbers in extended headers.
BROKEN = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, struct.error, tarfile.TarError)
BROKEN_ZIP = (*BROKEN, zipfile.BadZipFile, RuntimeError)

Member = tuple[str, bool, Callable[[], IO[bytes] | None]]  # name, whether it is a regular file, how to open it


@dataclass(frozen=True)
class Limits:
    """The most that an upload may hold. member_bytes, total_bytes: unpacked; ratio: unpacked bytes per packed byte."""

    members: int = 10_000
    member_bytes: int = 256 << 20
    total_bytes: int = 2 << 30
    ratio: int = 100


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    name: str
    reason: str


@dataclass
class Intake:
    """What is read from an upload. files: {name: content}; members, unpacked_bytes: counted so far, skipped or not."""

    limits: Limits
    packed_bytes: int
    files: dict[str, bytes] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    members: int = 0
    unpacked_bytes: int = 0

    def skip(self, name: str, reason: str) -> None:
        """Leave a file out, and say why."""
        self.skipped.append(Skipped(name, reason))

    def take(self, members: Iterable[Member], folder: str = "") -> None:
        """Read every regular member. A shard or a parquet file is counted by its members, not also by its own bytes."""
        for raw, regular, open_member in members:
            name = self._admitted(folder + _label(raw), regular=regular)
            data = None if name is None else self._read(name, open_member)
            if name is None or data is None:
                continue
            if not folder and (inside := _inside(data, self)):
                self.unpacked_bytes -= len(data)
                self._take_inside(name, inside)
            else:
                self.files[name] = data

    def _take_inside(self, name: str, members: Iterable[Member]) -> None:
        try:
            self.take(members, f"{name}/")
        except RequestError:
            raise
        except BROKEN as error:
            self.skip(name, f"is damaged: {error}")

    def _admitted(self, name: str, *, regular: bool) -> str | None:
        """Count a member; its normalised name, or None where it is skipped. Raises RequestError for one too many."""
        self.members += 1
        if self.members > self.limits.members:
            raise RequestError(f"input_images holds more than {self.limits.members} files. Expected at most so many.")
        label = posixpath.normpath(name)
        reason = _objection(name, regular=regular) or ("is a second file of this name" if label in self.files else "")
        if reason:
            self.skip(name, reason)
        return None if reason else label

    def _read(self, name: str, open_member: Callable[[], IO[bytes] | None]) -> bytes | None:
        """A member's content; None where it is skipped. Raises RequestError beyond the limits."""
        data = bytearray()
        try:
            with open_member() or io.BytesIO() as stream:
                while chunk := stream.read(1 << 20):
                    data += chunk
                    self._spend(name, len(chunk), len(data))
        except RequestError:
            raise
        except BROKEN_ZIP as error:
            self.skip(name, f"cannot be unpacked: {error}")
            return None
        return bytes(data)

    def _spend(self, name: str, count: int, size: int) -> None:
        self.unpacked_bytes += count
        if size > self.limits.member_bytes:
            most = self.limits.member_bytes
            raise RequestError(f"{name!r} in input_images has more than {most} bytes. Expected at most so many.")
        check_bytes(self.unpacked_bytes, self.packed_bytes, self.limits)


@dataclass
class Metered:
    """A stream that counts what is read: tarfile would read an extended header of any length into memory."""

    stream: IO[bytes] | gzip.GzipFile
    packed_bytes: int
    limits: Limits
    count: int = 0

    def read(self, size: int) -> bytes:
        """The next bytes. Raises RequestError beyond the limits."""
        data = self.stream.read(size)
        self.count += len(data)
        check_bytes(self.count, self.packed_bytes, self.limits)
        return data


def check_bytes(unpacked: int, packed: int, limits: Limits) -> None:
    """Raise RequestError when an upload unpacks to too many bytes."""
    if unpacked > limits.total_bytes:
        raise RequestError(
            f"input_images unpacks to more than {limits.total_bytes} bytes. Expected at most so many: scale the "
            "pictures down, as a training does to resolution in any case."
        )
    if unpacked > max(FREE_BYTES, limits.ratio * packed):
        raise RequestError(
            f"input_images unpacks to more than {unpacked - 1} bytes from {packed}. "
            f"Expected at most {limits.ratio} for each."
        )


def unpack(path: Path, limits: Limits) -> Intake:
    """All regular files of an upload by name. Raises RequestError."""
    if path.is_dir():
        intake = Intake(limits, limits.total_bytes)
        intake.take(_folder(path))
        return intake
    try:
        with path.open("rb") as file:
            intake = Intake(limits, path.stat().st_size)
            intake.take(_members(file, intake))
            return intake
    except RequestError:
        raise
    except BROKEN_ZIP as error:
        raise RequestError(f"input_images cannot be unpacked: {error}. Expected a whole zip, tar or tar.gz.") from error


def _members(file: IO[bytes], intake: Intake) -> Iterator[Member]:
    head = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    # A tar first: it may end in a zip's directory, when a zip is the last thing in it.
    if head.startswith(b"\x1f\x8b"):
        return _tar(Metered(gzip.GzipFile(fileobj=file), intake.packed_bytes, intake.limits))
    if _is_tar(head):
        return _tar(Metered(file, intake.packed_bytes, intake.limits))
    if zipfile.is_zipfile(file):
        return _zip(file)
    seen = "as a zip does, but its end is missing" if head.startswith(b"PK\3\4") else f"with {head[:8]!r}"
    raise RequestError(f"input_images is no archive: it begins {seen}. Expected a whole zip, tar or tar.gz.")


def _folder(root: Path) -> Iterator[Member]:
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            regular = path.is_file() and not path.is_symlink()
            yield path.relative_to(root).as_posix(), regular, partial(io.FileIO, path)


def _zip(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.flag_bits & 0x1:
                raise RequestError("input_images is an encrypted zip. Expected one that opens without a password.")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if not info.is_dir() and kind != stat.S_IFDIR:
                yield _zip_name(info), kind in (0, stat.S_IFREG), partial(_open_zipped, archive, info)


def _open_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA's memory is the sender's choice
        raise NotImplementedError(f"compression method {info.compress_type}, neither stored nor deflated")
    return archive.open(info)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name, as UTF-8 where it can be: macOS writes that without the flag for it."""
    try:
        return info.filename if info.flag_bits & 0x800 else info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _tar(stream: Any) -> Iterator[Member]:  # whatever can read(): typeshed asks for more than tarfile uses
    with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8") as archive:
        for member in archive:
            if not member.isdir():
                regular = member.isreg() and not member.issparse()
                yield member.name, regular, partial(archive.extractfile, member)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")  # checks the header's checksum
    except tarfile.HeaderError:
        return False
    return True


def _inside(data: bytes, intake: Intake) -> Iterator[Member] | None:
    """The members of a tar or parquet file within the upload; None for any other file."""
    if data.startswith(b"PAR1"):
        return _parquet(data, intake)
    return _tar(io.BytesIO(data)) if _is_tar(data) else None


def _parquet(data: bytes, intake: Intake) -> Iterator[Member]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise RequestError(
            "input_images holds a parquet file, and pyarrow is not installed. Install it, or send images and captions."
        ) from error
    table = parquet.ParquetFile(io.BytesIO(data))
    columns = [name for name in ("image", *CAPTION_KEYS, "action") if name in table.schema_arrow.names]
    if "image" not in columns:
        raise ValueError(f"its columns are {', '.join(table.schema_arrow.names)}, and none is called image")
    check_bytes(intake.unpacked_bytes + _stored_bytes(table.metadata, columns), intake.packed_bytes, intake.limits)
    # One row at a time, because rows that share a value each get a copy of it, and are counted only when they are read.
    rows = (row for batch in table.iter_batches(batch_size=1, columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        image = row["image"].get("bytes") if isinstance(row["image"], dict) else row["image"]
        yield f"{number:06}", True, partial(io.BytesIO, image if isinstance(image, bytes) else b"")
        if caption := next((row[name] for name in columns[1:] if isinstance(row[name], str)), None):
            yield f"{number:06}.txt", True, partial(io.BytesIO, caption.encode())


def _stored_bytes(metadata: Any, columns: Sequence[str]) -> int:
    """The bytes to which columns of a parquet file unpack, by its own account; values that rows share count once."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def _label(name: str) -> str:
    """A name made printable and comparable: forward slashes, composed accents, bytes that are no UTF-8 as Latin-1."""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = name.encode(errors="surrogateescape").decode("latin-1")
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _objection(name: str, *, regular: bool) -> str:
    """Why a member is skipped; "" if it is not."""
    parts = name.split("/")
    if name.startswith("/") or PureWindowsPath(name).drive or ".." in parts:
        return "has a name that leads out of the upload"
    if not regular:
        return "is a link or a device, not a file"
    hidden = any(part.startswith(".") and part != "." for part in parts)  # as Jupyter's older copies are
    if hidden or "__MACOSX" in parts or parts[-1].lower() in CLUTTER:
        return "is hidden or a system's, not yours"
    return ""
