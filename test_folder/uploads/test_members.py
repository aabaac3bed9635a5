"""Names and members of an upload that lead elsewhere, are no file of the sender's, or are there twice."""

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from klora.training.dataset import read_upload
from test_folder.uploads.packing import PNG, Files, drawn, encoded, in_folder, in_tar, in_zip, reasons

HOSTILE = [
    "../evil.png",
    "a/../../evil.png",
    "/etc/evil.png",
    "C:/evil.png",
    "..\\evil.png",
    "\\\\host\\share\\evil.png",
]


@pytest.mark.parametrize("pack", [in_zip, in_tar])
def test_a_name_that_leads_out_is_skipped_and_nothing_is_written(
    tmp_path: Path, pack: Callable[[Path, Files], Path]
) -> None:
    path = pack(tmp_path, {**dict.fromkeys(HOSTILE, PNG), "good.png": PNG})
    pictures, skipped = read_upload(path)
    assert [p.name for p in pictures] == ["good.png"]
    assert [item.reason for item in skipped] == ["has a name that leads out of the upload"] * len(HOSTILE)
    assert list(tmp_path.iterdir()) == [path]


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


def test_links_and_devices_in_a_tar_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "upload", "w") as archive:
        for number, kind in enumerate(LINKS):
            header = tarfile.TarInfo(f"{number}.png")
            header.type, header.linkname = kind, "good.png"
            archive.addfile(header)
        good = tarfile.TarInfo("./good.png")
        good.size = len(PNG)
        archive.addfile(good, io.BytesIO(PNG))
    pictures, skipped = read_upload(tmp_path / "upload")
    assert [p.name for p in pictures] == ["good.png"]
    assert [item.reason for item in skipped] == ["is a link or a device, not a file"] * len(LINKS)


def test_links_in_a_zip_and_in_a_folder_are_skipped(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "upload", "w") as archive:
        archive.writestr(link, b"good.png")
        archive.writestr("good.png", PNG)
    folder = in_folder(tmp_path, {"good.png": PNG})
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (tmp_path / "upload", folder):
        pictures, skipped = read_upload(path)
        assert [p.name for p in pictures] == ["good.png"]
        assert reasons(skipped) == {"link.png": "is a link or a device, not a file"}


def test_a_linked_folder_is_not_entered(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, {"good.png": PNG})
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "secret.png").write_bytes(PNG)
    (folder / "link").symlink_to(tmp_path / "else")
    assert [p.name for p in read_upload(folder)[0]] == ["good.png"]


def test_what_systems_leave_behind_is_skipped_at_any_depth(tmp_path: Path) -> None:
    clutter = ["__MACOSX/a.png", "x/__MACOSX/a.png", "x/._a.png", "x/.DS_Store", "Thumbs.db",
               "x/.ipynb_checkpoints/a-checkpoint.png", ".hidden/a.png"]  # fmt: skip
    pictures, skipped = read_upload(in_tar(tmp_path, {**dict.fromkeys(clutter, PNG), "./x/a.b.png": PNG}))
    assert [p.name for p in pictures] == ["x/a.b.png"]
    assert reasons(skipped) == dict.fromkeys(clutter, "is hidden or a system's, not yours")


def test_names_that_are_no_utf8_print_and_stay_apart(tmp_path: Path) -> None:
    names = ["caf\udce9.png", "caf\udce8.png"]
    pictures, _ = read_upload(in_tar(tmp_path, {**dict.fromkeys(names, PNG), "caf\udce9.txt": b"e"}))
    assert [(p.name.encode(), p.caption) for p in pictures] == [("cafè.png".encode(), None), ("café.png".encode(), "e")]


def test_a_mac_zip_matches_its_accents(tmp_path: Path) -> None:
    decomposed = "cafe\u0301.png"
    data = in_zip(tmp_path, {decomposed: PNG, "captions.csv": "caption,image\nhere,café.png\n".encode()}).read_bytes()
    name = decomposed.encode()
    for at in (data.index(name) - 30, data.rindex(name) - 46):  # local and central header: clear the flag of UTF-8
        flag = at + (6 if data[at : at + 4] == b"PK\3\4" else 8)
        data = data[: flag + 1] + b"\0" + data[flag + 2 :]
    (tmp_path / "upload").write_bytes(data)
    assert [(p.name, p.caption) for p in read_upload(tmp_path / "upload")[0]] == [("café.png", "here")]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_second_file_of_one_name_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "upload", "w") as archive:
        for data in (PNG, encoded(drawn("blue"))):
            archive.writestr("a.png", data)
    pictures, skipped = read_upload(tmp_path / "upload")
    assert [p.data for p in pictures] == [PNG]
    assert reasons(skipped) == {"a.png": "is a second file of this name"}
