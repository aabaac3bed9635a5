"""Archives in an upload: a tar is a folder of samples, all others are skipped."""

from collections.abc import Callable
from pathlib import Path

import pytest

from klora.training.dataset import read_upload
from test_folder.uploads.packing import NOISE, PNG, Files, in_folder, in_tar_gz, in_zip, reasons, tar_bytes


@pytest.mark.parametrize("pack", [in_zip, in_tar_gz, in_folder])
def test_a_shard_is_a_folder_of_samples(tmp_path: Path, pack: Callable[[Path, Files], Path]) -> None:
    first = {"1.png": PNG, "1.txt": b"one", "2.png": PNG, "2.json": b'{"caption": "two"}'}
    second = {"1.cls": b"a dog", "1.png": PNG, "nested.tar": tar_bytes({"x.png": PNG})}
    pictures, skipped = read_upload(pack(tmp_path, {"s-0.tar": tar_bytes(first), "s-1.tar": tar_bytes(second)}))
    assert [(p.name, p.caption) for p in pictures] == [
        ("s-0.tar/1.png", "one"), ("s-0.tar/2.png", "two"), ("s-1.tar/1.png", "a dog"),
    ]  # fmt: skip
    assert [item.name for item in skipped] == ["s-1.tar/nested.tar"]


def test_a_shard_cannot_lead_out_either(tmp_path: Path) -> None:
    pictures, skipped = read_upload(in_zip(tmp_path, {"s.tar": tar_bytes({"../a.png": PNG, "b.png": PNG})}))
    assert [p.name for p in pictures] == ["s.tar/b.png"]
    assert [item.name for item in skipped] == ["s.tar/../a.png"]


def test_other_archives_inside_are_skipped(tmp_path: Path) -> None:
    inner = in_zip(tmp_path, {"x.png": PNG}).read_bytes()
    files = {"a.png": PNG, "b.zip": inner, "c.tar.gz": tar_bytes({"x.png": PNG}, "w:gz"), "d.7z": b"7z\xbc\xaf\x27\x1c"}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.name for p in pictures] == ["a.png"]
    assert reasons(skipped) == dict.fromkeys(["b.zip", "c.tar.gz", "d.7z"], "is an archive in the upload")


def test_a_damaged_shard_is_reported(tmp_path: Path) -> None:
    shard = tar_bytes({"x.png": PNG, "y.bin": NOISE})
    pictures, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "s.tar": shard[: -(1 << 20)]}))
    assert [p.name for p in pictures] == ["a.png", "s.tar/x.png"]
    assert {item.name for item in skipped} <= {"s.tar", "s.tar/y.bin"}
    assert skipped
