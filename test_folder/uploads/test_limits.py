"""An upload that would unpack to too much is refused before it does."""

import gzip
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from klora.training.dataset import Limits, read_upload
from test_folder.uploads.packing import NOISE, PNG, Files, every_form, in_tar_gz, in_zip, reasons, refusal, tar_bytes


def test_a_bomb_is_refused_by_its_ratio_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: seen.append(n) or read(self, n))
    path = in_zip(tmp_path, {"a.png": PNG, "bomb.bmp": bytes(64 << 20)})
    assert "Expected at most 100 for each" in refusal(path)
    assert 0 < sum(seen) <= 20 << 20
    assert "Expected at most 100 for each" in refusal(in_tar_gz(tmp_path, {"a.png": PNG, "bomb": bytes(64 << 20)}))


def test_a_bomb_of_many_members_is_refused_by_their_sum(tmp_path: Path) -> None:
    assert "Expected at most 100 for each" in refusal(in_zip(tmp_path, {f"{i}.png": bytes(1 << 20) for i in range(30)}))


def test_a_gzipped_header_of_any_length_is_refused_while_it_is_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "upload").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(40 << 20)))
    assert "Expected at most 100 for each" in refusal(tmp_path / "upload")


@every_form
def test_each_limit_is_kept(tmp_path: Path, pack: Callable[[Path, Files], Path]) -> None:
    path = pack(tmp_path, {"a.png": PNG, "b.txt": NOISE, "c.txt": NOISE})
    assert refusal(path, Limits(members=2)) == "input_images holds more than 2 files. Expected at most so many."
    assert refusal(path, Limits(member_bytes=len(NOISE) - 1)).startswith("'b.txt' in input_images has more than")
    assert refusal(path, Limits(total_bytes=2 * len(NOISE))).startswith(
        "input_images unpacks to more than 4194304 bytes. Expected at most so many: scale the pictures down, as"
    )
    assert len(read_upload(path, Limits(3, len(NOISE), 2 * len(NOISE) + (1 << 20)))[0]) == 1


def test_the_page_says_the_limits() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    assert Limits() == Limits(members=10_000, member_bytes=256 << 20, total_bytes=2 << 30)
    assert "at most 10,000 files, hidden ones included, of at most 256 MiB each and 2 GiB together" in page


def test_a_sparse_member_of_a_terabyte_is_skipped(tmp_path: Path) -> None:
    header = tarfile.TarInfo("sparse.png")
    header.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,0"}
    data = header.tobuf(tarfile.PAX_FORMAT) + tar_bytes({"good.png": PNG})
    (tmp_path / "upload").write_bytes(data)
    pictures, skipped = read_upload(tmp_path / "upload")
    assert [p.name for p in pictures] == ["good.png"]
    assert reasons(skipped) == {"sparse.png": "is a link or a device, not a file"}


def test_shards_count_as_what_is_in_them(tmp_path: Path) -> None:
    shard = tar_bytes({"a.png": PNG, "a.bin": NOISE})
    path = in_zip(tmp_path, {"s.tar": shard})
    assert len(read_upload(path, Limits(total_bytes=len(shard) + 100))[0]) == 1
    assert "holds more than 2 files" in refusal(path, Limits(members=2))
