"""What a file is, by its bytes alone: a .safetensors file or a plain tar, or else what it looks like.

Tells a whole file from a broken one; whether a LoRA is in it is read in klora.files.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from klora.errors import SourceError

HEAD_BYTES = 512  # of a file, that tell what it is
MAX_HEADER_BYTES = 10 << 20  # of a .safetensors file
MAX_MEMBERS = 10_000  # of a tar
MAX_PADDING_BYTES = 1 << 20  # after a tar's last member
MAX_RECORD_BYTES = 1 << 20  # of a tar's long names and attributes, which readers hold in memory

WEB_PAGE = "a web page, perhaps a login page"
JSON = "a JSON answer"
EXPECTED = "Expected a .safetensors file, or an uncompressed .tar that holds one."

_BLOCK = 512  # of a tar
_EMPTY = {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE}
_ATTRIBUTES = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_RECORDS = {*_ATTRIBUTES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_KINDS = (
    (b"<", WEB_PAGE),
    (b"{", JSON),
    (b"[", JSON),
    (b"\x80", "a pickle, which could run code"),
    (b"PK", "a zip archive or a PyTorch checkpoint, which could run code"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
)


def unlike_lora(head: bytes) -> str | None:
    """What a file looks like that begins with these bytes; None for what may hold a LoRA."""
    return None if _is_safetensors(head) or _is_tar(head) else _looks_like(head)


def unlike_json(head: bytes) -> str | None:
    """What a file looks like that begins with these bytes; None for what may be a JSON object."""
    kind = _looks_like(head)
    return None if kind == JSON else kind


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for start, kind in _KINDS if text.startswith(start)), "something unknown")


def check_structure(path: Path) -> None:
    """Raise SourceError unless the file is whole: it ends where its own header, or the end of its archive, says."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        kind = unlike_lora(head)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        whole = kind is None and (_safetensors_end(file) == size if _is_safetensors(head) else _tar_ends(file, size))
    if not whole:
        seen = f"looks like {kind}" if kind else "is damaged, or does not end where it says"
        raise SourceError(f"The file {seen}. {EXPECTED}")


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _safetensors_end(file: BinaryIO) -> int | None:
    """Where the last tensor ends, in bytes from the beginning; None where the header cannot be read."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + length + max(map(int, ends), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None


def _tar_ends(file: BinaryIO, size: int) -> bool:
    """Whether a tar's members follow one another to the two empty blocks that end it, and nothing comes after these.

    Read here and not by tarfile, which takes a tar that is cut between two members for a whole one, holds every member
    and takes records of any length into memory.
    """
    for _ in range(MAX_MEMBERS + 1):
        block = file.read(_BLOCK)
        if block == bytes(_BLOCK):
            padding = file.read(MAX_PADDING_BYTES)
            return len(padding) >= _BLOCK and not padding.strip(b"\0") and not file.read(1)
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        length = 0 if member.type in _EMPTY else -(-member.size // _BLOCK) * _BLOCK
        if member.type == tarfile.GNUTYPE_SPARSE or member.size < 0 or file.tell() + length > size:
            return False
        if member.type not in _RECORDS:
            file.seek(length, os.SEEK_CUR)
        elif length > MAX_RECORD_BYTES or not _is_plain(file.read(length), member.type):
            return False
    return False


def _is_plain(record: bytes, kind: bytes) -> bool:
    """Whether a record changes nothing of where a member ends: attributes may hold a size, for members above 8 GiB."""
    return kind not in _ATTRIBUTES or not (b" size=" in record or b" GNU.sparse." in record)
