"""What a file is, by its bytes alone, and whether it is whole (T7, T8)."""

import gzip
import io
import json
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from klora.errors import SourceError
from klora.sources.formats import MAX_MEMBERS, check_structure, unlike_lora


def safetensors(size: int = 3000, fill: bytes = b"w") -> bytes:
    """A file of one tensor of so many bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + fill * size


def tar(*members: tuple[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, body in members:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return file.getvalue()


GOOD = safetensors()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", "x" * 600)
    return file.getvalue()


FOREIGN = {
    "a web page": [b"<!DOCTYPE html><html>Log in", b"\r\n  <html>", b"\xef\xbb\xbf<HTML>", b"<?xml version='1.0'?>"],
    "a JSON answer": [b'{"error":"Unauthorized"}', b' [{"a": 1}]', json.dumps({"a": "x" * 999}).encode()],
    "a pickle": [pickle.dumps({"a": 1}), pickle.dumps("x" * 999, protocol=2)],
    "a zip archive": [zipped()],
    "a gzip archive": [gzip.compress(GOOD), tar(("lora.safetensors", GOOD), mode="w:gz")],
    "a bzip2 archive": [tar(("lora.safetensors", GOOD), mode="w:bz2")],
    "an xz archive": [tar(("lora.safetensors", GOOD), mode="w:xz")],
    "an empty file": [b""],
    "something unknown": [b"x" * 600, b"\x00" * 600, (11 << 20).to_bytes(8, "little") + b"{" * 600, b"\xff" * 8 + b"{"],
}
KINDS = [
    pytest.param(kind, body, id=f"{kind} {n}")  # not by its bytes, which hold the time
    for kind, bodies in FOREIGN.items()
    for n, body in enumerate(bodies)
]


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x5B, 0x80, 0x4B50, 0x8B1F, 0x0A])
def test_a_header_whose_length_looks_like_something_else_is_none_the_less_a_header(length: int) -> None:
    header = b'{"__metadata__":{}}'.ljust(length) if length > 19 else b"{}".ljust(length)
    assert unlike_lora(length.to_bytes(8, "little") + header) is None


# Whole files and broken ones.


def checked(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(body)
    check_structure(path)


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def with_symlink() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("é" * 200 + kind.decode())
            member.type, member.linkname = kind, "elsewhere" * 30
            archive.addfile(member)
        member = tarfile.TarInfo("lora.safetensors")
        member.size = len(GOOD)
        archive.addfile(member, io.BytesIO(GOOD))
    return file.getvalue()


def sized_directory() -> bytes:
    """A folder with a size of its own and no data, as some programs write it."""
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.DIRTYPE, 1024
    return member.tobuf(tarfile.GNU_FORMAT) + tar(("a/b", GOOD))


def name_of_a_size() -> bytes:
    record = b"a size=1" * 20
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, len(record)
    return member.tobuf(tarfile.GNU_FORMAT) + record.ljust(512, b"\0") + tar(("a", GOOD))


@pytest.mark.parametrize(
    "body",
    [GOOD, header(b"{}"), header(b'{"__metadata__":{"a":"b"}}'), tar(("a", b"")), tar(("a" * 300, GOOD), ("b", b"x")),
     tar(("a", GOOD)).rstrip(b"\0").ljust(-(-(512 + len(GOOD)) // 512) * 512 + 1024, b"\0"),
     with_symlink(), sized_directory(), name_of_a_size()],
    ids=["safetensors", "no tensor", "metadata", "empty member", "long name", "unpadded", "kinds",
         "sized folder", "named size"],
)  # fmt: skip
def test_a_whole_file_is_taken_for_whole(tmp_path: Path, body: bytes) -> None:
    checked(tmp_path, body)


def sparse() -> bytes:
    member = tarfile.TarInfo("a")
    member.type = tarfile.GNUTYPE_SPARSE
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def pax(record: bytes) -> bytes:
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.XHDTYPE, len(record)
    return member.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0") + tar(("a", GOOD))


def sized(size: int) -> bytes:
    member = tarfile.TarInfo("a")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


WHOLE_TAR = tar(("a", GOOD), ("b", GOOD))
DAMAGED: dict[str, Callable[[], bytes]] = {
    "cut": lambda: GOOD[:-1],
    "longer": lambda: GOOD + b"x",
    "a zip behind": lambda: GOOD + zipped(),
    "cut in its header": lambda: GOOD[:30],
    "no header": lambda: GOOD[:9],
    "header of a list": lambda: header(b"{" + b"[" * 99_999),
    "no offsets": lambda: header(b'{"a":{}}'),
    "offsets without end": lambda: header(b'{"a":{"data_offsets":[0,1e999]}}'),
    "offsets of words": lambda: header(b'{"a":{"data_offsets":["b","c"]}}'),
    "tensors of none": lambda: header(b'{"a":null}'),
    "tar cut in a member": lambda: WHOLE_TAR[:2000],
    "tar cut between members": lambda: tar(("a", GOOD))[: 512 + 3584],
    "tar cut after one empty block": lambda: tar(("a", GOOD)).rstrip(b"\0").ljust(512 + 3584 + 512, b"\0"),
    "tar with a damaged header": lambda: WHOLE_TAR.replace(b"b" + bytes(99), b"c" + bytes(99)),
    "tar with a zip behind": lambda: WHOLE_TAR + zipped(),
    "tar with too much behind": lambda: WHOLE_TAR + bytes(2 << 20),
    "tar of a sparse file": sparse,
    "tar of a size that leads to its header again": lambda: sized(-512),
    "tar of a size that leads before its beginning": lambda: sized(-4096),
    "tar of a size that no file has": lambda: sized(1 << 80),
    "tar of attributes with a size": lambda: pax(b"13 size=1024\n"),
    "tar of attributes of a sparse file": lambda: pax(b"22 GNU.sparse.major=1\n"),
    "tar of a long name": lambda: pax(b"x" * (2 << 20)),
    "tar of many": lambda: tar(*(("a", b"") for _ in range(MAX_MEMBERS + 1))),
}


@pytest.mark.parametrize("body", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, body: Callable[[], bytes]) -> None:
    data = body()
    start = time.thread_time()  # in seconds of work, whatever else the machine does
    with pytest.raises(SourceError, match=r"^The file is damaged, .* Expected a \.safetensors file"):
        checked(tmp_path, data)
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(("kind", "body"), KINDS)
def test_a_file_of_another_kind_is_refused_on_the_disk_too(tmp_path: Path, kind: str, body: bytes) -> None:
    with pytest.raises(SourceError, match=f"^The file looks like {kind}"):
        checked(tmp_path, body)
