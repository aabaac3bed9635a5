"""Tars of trainers and of others: members are found by their name and written under ours, or the tar is refused."""

import gzip
import io
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save

from klora.errors import LoRAError
from klora.files.container import MAX_MEMBERS, opened
from test_folder.fakes import tarred
from test_folder.fakes.tars import CHAIN, ENDLESS, crafted, endless_map, header
from test_folder.files.reading import GOOD
from test_folder.waiting import at_most

LORA = save(GOOD)

Add = Callable[[tarfile.TarFile], None]
Read = Callable[[bytes], set[str]]


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", body: bytes = b"") -> Add:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, len(body)
        tar.addfile(info, io.BytesIO(body))

    return add


def archive(*members: Add) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for add in members:
            add(tar)
    return file.getvalue()


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The names of a tar's tensors, once it is seen that reading left nothing where its members would climb to."""
    scratch, path = tmp_path / "some" / "where", tmp_path / "trained.tar"
    scratch.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def names(body: bytes) -> set[str]:
        path.write_bytes(body)
        try:
            with opened(path) as contents:
                return set(contents.specs)
        finally:
            assert {*tmp_path.rglob("*")} == {path, scratch, scratch.parent}

    return names


@pytest.mark.parametrize(
    "name",
    [
        "lora.safetensors",
        "output/flux_train_replicate/lora.safetensors",
        "/etc/lora.safetensors",
        "../../lora.safetensors",
        "../folder-else/lora.safetensors",
        "a/../../../lora.safetensors",
    ],
)
def test_a_lora_is_found_by_its_name_wherever_it_would_go(read: Read, name: str) -> None:
    """R1, R2, R3: absolute, climbing, and beside the folder."""
    assert read(archive(member(name, body=LORA))) == set(GOOD)


LINKS = {
    "symbolic link": (tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": (tarfile.LNKTYPE, "secret.bin"),
    "device": (tarfile.CHRTYPE, ""),
    "disk": (tarfile.BLKTYPE, ""),
    "pipe": (tarfile.FIFOTYPE, ""),
    "folder": (tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("kind", LINKS)
def test_what_is_no_plain_file_is_none(read: Read, kind: str) -> None:
    """R3, alone, and before the file that is meant."""
    bad = member("lora.safetensors", *LINKS[kind])
    before = member("secret.bin", body=b"secret")
    with pytest.raises(
        LoRAError, match=r"^trained\.tar cannot be read \(a tar of 0 \.safetensors files\)\. Expected one"
    ):
        read(archive(before, bad))
    assert read(archive(before, bad, member("b/lora.safetensors", body=LORA))) == set(GOOD)


def sparse() -> bytes:
    info = tarfile.TarInfo("lora.safetensors")
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def sized(size: str) -> bytes:
    """A tar whose attributes tell another size than the member has."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("lora.safetensors")
        info.size, info.pax_headers = len(LORA), {"size": size}
        tar.addfile(info, io.BytesIO(LORA))
    return file.getvalue()


WHOLE = tarred({"lora.safetensors": LORA})
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "two": (lambda: tarred({"a/lora.safetensors": LORA, "b/lora.safetensors": LORA}), "weights in 'a' and in 'b'"),
    "twice": (lambda: archive(*[member("lora.safetensors", body=LORA)] * 2), "'lora.safetensors' twice"),
    "two names": (lambda: tarred({"x.safetensors": LORA, "y.safetensors": LORA}), "a tar of 2 .safetensors files"),
    "empty": (lambda: tarred({"config.yaml": b"a: 1"}), "a tar of 0 .safetensors files"),
    "many": (lambda: archive(*[member("a")] * (MAX_MEMBERS + 1)), f"more than {MAX_MEMBERS} files"),
    "gzip": (lambda: gzip.compress(WHOLE, mtime=0), "cannot be read"),
    "cut": (lambda: WHOLE[: 512 + len(LORA) // 2], "cannot be read"),
    "sparse": (sparse, "a tar of 0 .safetensors files"),
    "larger than it is": (lambda: sized(str(1 << 40)), "cannot be read"),
    "longer than it is": (lambda: sized(str(len(LORA) + (1 << 20))), "cannot be read"),
    "headers of a size below nothing": (lambda: header("a", -512, tarfile.GNUTYPE_LONGNAME) + WHOLE, "headers that"),
    "a chain of headers": (lambda: CHAIN + WHOLE, "headers that cannot be read"),
    "a map of holes that ends too soon": (lambda: crafted(endless_map("lora.safetensors")), "headers that cannot be"),
    **{
        f"endless, {kind}": (partial(lambda of: crafted(of("lora.safetensors")), of), "")
        for kind, of in ENDLESS.items()
    },
    "a member that is no LoRA": (lambda: tarred({"lora.safetensors": b"x" * 600}), "cannot be read"),
}


@pytest.fixture
def pythons_recursion_limit() -> Iterator[None]:
    """Which torch's compiler raises where it is imported."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("pythons_recursion_limit")
@pytest.mark.parametrize("case", REFUSED)
def test_any_other_tar_is_refused_in_one_sentence(read: Read, tmp_path: Path, case: str) -> None:
    """R3."""
    body, why = REFUSED[case]
    with at_most(10), pytest.raises(LoRAError) as error:
        read(body())
    assert why in str(error.value) and " Expected " in str(error.value)
    assert str(error.value).startswith("trained.tar ") and str(tmp_path) not in str(error.value)
