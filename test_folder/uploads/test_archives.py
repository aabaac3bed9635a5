"""A folder, a zip or a tar gives the same pictures in one order; what is no archive, or a broken one, is refused."""

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

from klora.training.dataset import Skipped, read_upload
from test_folder.uploads.packing import (
    NOISE,
    PNG,
    Files,
    drawn,
    encoded,
    every_form,
    in_tar,
    in_tar_gz,
    in_zip,
    reasons,
    refusal,
)

# The four forms.


@every_form
def test_every_form_gives_the_same_pictures(tmp_path: Path, pack: Callable[[Path, Files], Path]) -> None:
    files = {"a/10.png": PNG, "a/9.png": PNG, "a/9.txt": b"nine", "b/9.png": encoded(drawn("blue")), "b/notes.md": b"-"}
    pictures, skipped = read_upload(pack(tmp_path, files))
    assert [(p.name, p.caption) for p in pictures] == [("a/9.png", "nine"), ("a/10.png", None), ("b/9.png", None)]
    assert [p.data for p in pictures] == [files["a/9.png"], files["a/10.png"], files["b/9.png"]]
    assert skipped == [Skipped("b/notes.md", "is no image that is known here")]


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = in_zip(tmp_path, {"inner.png": PNG}).read_bytes()
    pictures, skipped = read_upload(in_tar(tmp_path, {"outer.png": PNG, "z.zip": inner}))
    assert [p.name for p in pictures] == ["outer.png"]
    assert reasons(skipped) == {"z.zip": "is an archive in the upload"}


def test_names_sort_as_people_count(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "10.png", "a1.png", "A2.png", "a10b2.png", "a10b10.png", "b" + "9" * 50 + ".png"]
    for order in (names, names[::-1]):
        assert [p.name for p in read_upload(in_zip(tmp_path, dict.fromkeys(order, PNG)))[0]] == names


def test_a_name_with_thousands_of_digits_sorts(tmp_path: Path) -> None:
    names = ["9" * 5000 + ".png", "1" + "0" * 5000 + ".png"]
    assert [p.name for p in read_upload(in_tar(tmp_path, dict.fromkeys(names, PNG)))[0]] == names


# Not an upload.


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    for data in (PNG, b"", bytes(2048)):
        path.write_bytes(data)
        assert refusal(path).startswith("input_images is no archive: it begins with b'")
    path.write_bytes(b"PK\3\4 not really")
    assert refusal(path).startswith("input_images is no archive: it begins as a zip does, but its end is missing.")
    path.write_bytes(gzip.compress(b"no tar in here"))
    assert refusal(path).startswith("input_images cannot be unpacked: ")
    assert refusal(tmp_path / "nowhere").startswith("input_images cannot be unpacked: ")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    data = bytearray(in_zip(tmp_path, {"a.png": PNG}).read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "upload").write_bytes(data)
    assert refusal(tmp_path / "upload") == (
        "input_images is an encrypted zip. Expected one that opens without a password."
    )


def test_an_archive_that_ends_early_is_refused(tmp_path: Path) -> None:
    for pack in (in_tar_gz, in_zip):
        path = pack(tmp_path, {"a.png": PNG, "b.bin": NOISE})
        path.write_bytes(path.read_bytes()[:-5000])
        assert refusal(path).startswith("input_images ")


def test_a_damaged_member_is_skipped_and_the_rest_is_used(tmp_path: Path) -> None:
    data = bytearray(in_zip(tmp_path, {"bad.png": NOISE, "good.png": PNG}).read_bytes())
    data[1000] ^= 1
    (tmp_path / "upload").write_bytes(data)
    pictures, skipped = read_upload(tmp_path / "upload")
    assert [p.name for p in pictures] == ["good.png"]
    assert reasons(skipped)["bad.png"].startswith("cannot be unpacked: ")


def test_a_zip_method_whose_memory_the_sender_chooses_is_skipped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "upload", "w") as archive:
        archive.writestr("good.png", PNG)
        archive.writestr("lzma.png", PNG, zipfile.ZIP_LZMA)
    assert reasons(read_upload(tmp_path / "upload")[1]) == {
        "lzma.png": "cannot be unpacked: compression method 14, neither stored nor deflated"
    }


def test_an_upload_without_a_picture_says_what_was_seen(tmp_path: Path) -> None:
    message = refusal(in_zip(tmp_path, {"a.txt": b"x", "b.jpg": b"x", "c.bin": b"x", "d.bin": b"x"}))
    assert message.startswith("input_images has no usable picture: 4 files seen; 'a.txt' has a caption for 'a', which ")
    assert "'b.jpg' is no image that is known here; 'c.bin' is" in message
    assert "d.bin" not in message
    assert message.endswith("Expected PNG, JPEG, WEBP, AVIF, BMP, TIFF, GIF files.")
