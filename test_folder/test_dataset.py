"""Uploads of every kind, honest and hostile: which pictures come out, with what, and what is said of the rest."""

import gzip
import io
import itertools
import json
import random
import stat
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klora.errors import RequestError
from klora.training.dataset import Limits, Picture, Skipped, captioned, dataset_hash, read_upload

Files = Mapping[str, bytes]


def drawn(color: str = "red", size: tuple[int, int] = (80, 70)) -> Image.Image:
    """A picture with a white top left corner, so that turning it shows."""
    image = Image.new("RGB", size, color)
    image.paste((255, 255, 255), (0, 0, size[0] // 4, size[1] // 4))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


PNG = encoded(drawn())
DEFAULT = Limits()
NOISE = random.Random(0).randbytes(2 << 20)


def in_folder(path: Path, files: Files) -> Path:
    for name, data in files.items():
        (path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "folder" / name).write_bytes(data)
    return path / "folder"


def in_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path / "upload", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path / "upload"


def tar_bytes(files: Files, mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def in_tar(path: Path, files: Files) -> Path:
    (path / "upload").write_bytes(tar_bytes(files))
    return path / "upload"


def in_tar_gz(path: Path, files: Files) -> Path:
    (path / "upload").write_bytes(tar_bytes(files, "w:gz"))
    return path / "upload"


every_form = pytest.mark.parametrize("pack", [in_folder, in_zip, in_tar, in_tar_gz])


def captions(path: Path, files: Files) -> dict[str, str | None]:
    return {picture.name: picture.caption for picture in read_upload(in_zip(path, files))[0]}


def reasons(skipped: list[Skipped]) -> dict[str, str]:
    return {item.name: item.reason for item in skipped}


def opened(data: bytes) -> Image.Image:
    return Picture("x", data, None, None).open()


def refusal(path: Path, limits: Limits = DEFAULT) -> str:
    with pytest.raises(RequestError) as error:
        read_upload(path, limits)
    return str(error.value)


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


# Names and members that lead elsewhere.


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
    clutter = ["__MACOSX/a.png", "x/__MACOSX/a.png", "x/._a.png", "x/.DS_Store", "Thumbs.db"]
    pictures, skipped = read_upload(in_zip(tmp_path, {**dict.fromkeys(clutter, PNG), "x/a.png": PNG}))
    assert [p.name for p in pictures] == ["x/a.png"]
    assert reasons(skipped) == dict.fromkeys(clutter, "is an operating system's, not yours")


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


# Too much.


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
    assert "unpacks to more than 4194304 bytes" in refusal(path, Limits(total_bytes=2 * len(NOISE)))
    assert len(read_upload(path, Limits(3, len(NOISE), 2 * len(NOISE) + (1 << 20)))[0]) == 1


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
    assert message.endswith("Expected PNG, JPEG, WEBP, BMP, TIFF, GIF files.")


# Images.


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_an_image_is_known_by_its_content_and_decodes(tmp_path: Path, format: str) -> None:
    (picture,), skipped = read_upload(in_zip(tmp_path, {"photo.dat": encoded(drawn(), format)}))
    assert not skipped
    assert (picture.open().mode, picture.open().size) == ("RGB", (80, 70))
    assert np.abs(np.asarray(picture.open(), int)[40, 40] - (255, 0, 0)).max() <= 3  # JPEG's own rounding


def test_an_image_of_another_kind_is_skipped(tmp_path: Path) -> None:
    files = {"a.png": PNG, "b.png": encoded(drawn(), "ICO"), "c.ppm": encoded(drawn(), "PPM")}
    assert [p.name for p in read_upload(in_zip(tmp_path, files))[0]] == ["a.png"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_image_is_skipped(tmp_path: Path, format: str, share: float) -> None:
    grain = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    whole = encoded(grain, format)
    pictures, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "cut": whole[: int(len(whole) * share)]}))
    assert [p.name for p in pictures] == ["a.png"]
    assert [item.name for item in skipped] == ["cut"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF and EXIF
def test_damaged_images_raise_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(0)
    files = {"good.png": PNG}
    exif = Image.Exif()
    exif[0x0112] = 6
    for format, number in itertools.product(("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"), range(60)):
        data = bytearray(encoded(drawn(), format, **({} if format in ("BMP", "GIF") else {"exif": exif})))
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(min(len(data), 300))] = draw.randrange(256)
        files[f"{format}{number}"] = bytes(data)
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert {*(p.name for p in pictures), *(item.name for item in skipped)} == set(files)
    assert len(skipped) > 100


def test_sides_below_64_pixels_and_areas_above_64_megapixels_are_skipped(tmp_path: Path) -> None:
    sizes = [(64, 64), (63, 500), (500, 63), (16, 16), (1, 5000), (5000, 70), (64 << 10, (1 << 10) + 1)]
    files = {f"{w}x{h}": encoded(Image.new("1", (w, h))) for w, h in sizes}
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + PNG[24:29]
    files["bomb"] = PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert {p.name for p in pictures} == {"64x64", "5000x70"}
    assert reasons(skipped) == {
        **{name: f"is {name}, smaller than 64 pixels" for name in ("63x500", "500x63", "16x16", "1x5000")},
        "65536x1025": "has 65536x1025 pixels, more than 67108864",
        "bomb": "has more than 67108864 pixels",
    }


def test_exif_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = opened(encoded(drawn(), exif=exif))
    assert turned.tobytes() == drawn().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_transparency_lies_over_white() -> None:
    image = drawn().convert("RGBA")
    image.putalpha(128)
    assert np.abs(np.asarray(opened(encoded(image)), int)[40, 40] - (255, 127, 127)).max() <= 1
    palette = drawn().quantize(4)
    palette.info["transparency"] = palette.getpixel((40, 40))
    assert opened(encoded(palette)).getpixel((40, 40)) == (255, 255, 255)


def test_palettes_grey_and_cmyk_become_rgb() -> None:
    assert opened(encoded(drawn().quantize(4))).getpixel((40, 40)) == (255, 0, 0)
    assert opened(encoded(Image.new("LA", (80, 80), (90, 255)))).getpixel((0, 0)) == (90, 90, 90)
    cmyk = opened(encoded(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))
    assert np.abs(np.subtract(cmyk, (255, 0, 0))).max() <= 3  # JPEG's own rounding


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_greys(format: str) -> None:
    ramp = np.arange(0, 1 << 16, 4, np.uint16).reshape(128, 128)
    assert np.array_equal(np.asarray(opened(encoded(Image.fromarray(ramp), format)))[..., 1], ramp >> 8)


def test_floating_point_pixels_are_skipped(tmp_path: Path) -> None:
    files = {"a.png": PNG, "f.tiff": encoded(Image.new("F", (80, 80)), "TIFF")}
    assert "holds F pixels" in reasons(read_upload(in_zip(tmp_path, files))[1])["f.tiff"]


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_the_first_frame_of_an_animation_is_the_picture(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(drawn(), format, save_all=True, append_images=[drawn("blue"), drawn("green")], **options)
    assert opened(data).tobytes() == drawn().tobytes()


# Captions.


def test_a_caption_belongs_to_the_picture_of_its_name_or_stem_in_its_folder(tmp_path: Path) -> None:
    files = dict.fromkeys(["a/1.png", "b/1.png", "a/2.v2.png", "B/X.PNG"], PNG)
    texts = {"a/1.txt": b"a one", "b/1.png.txt": b" b\r\none ", "a/2.v2.txt": b"two", "B/x.TXT": b"x"}
    assert captions(tmp_path, {**files, **texts}) == {
        "a/1.png": "a one", "a/2.v2.png": "two", "b/1.png": "b one", "B/X.PNG": "x",
    }  # fmt: skip


def test_case_tells_files_apart_where_both_exist(tmp_path: Path) -> None:
    files = {"A.png": PNG, "a.png": PNG}
    table = b"caption,image\nlarge,A.png\nsmall,a.png\n"
    for texts in ({"A.txt": b"large", "a.txt": b"small"}, {"captions.csv": table}):
        assert captions(tmp_path, {**files, **texts}) == {"A.png": "large", "a.png": "small"}
    assert captions(tmp_path, {**files, "a.txt": b"small"}) == {"A.png": None, "a.png": "small"}


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        ("smörgås".encode(), "smörgås"), (b"\xef\xbb\xbf" + "smörgås".encode(), "smörgås"),
        ("smörgås".encode("latin-1"), "smörgås"), ("smörgås".encode("utf-16"), "smörgås"),
        (b"BMW on a road", "BMW on a road"), (b" \n", None),
    ],
)  # fmt: skip
def test_a_text_is_read_whatever_wrote_it(tmp_path: Path, data: bytes, caption: str | None) -> None:
    assert captions(tmp_path, {"a.png": PNG, "a.txt": data}) == {"a.png": caption}


def test_metadata_and_tables_name_files_in_their_own_folder(tmp_path: Path) -> None:
    pictures = dict.fromkeys(["a.png", "x/a.png", "x/b, c.png", "x/d.png", "x/y/e.png"], PNG)
    table = 'caption,image_file\n"one, two",a.png\n"a ""quoted"" word","b, c.png"\n'.encode("utf-8-sig")
    lines = [{"file_name": "d.png", "text": "dee"}, {"file_name": "./y/e.png", "prompt": "eee"}]
    metadata = "\n\n".join(json.dumps(line) for line in lines).encode()
    assert captions(tmp_path, {**pictures, "x/My_Captions.csv": table, "x/metadata.jsonl": metadata}) == {
        "a.png": None, "x/a.png": "one, two", "x/b, c.png": 'a "quoted" word', "x/d.png": "dee", "x/y/e.png": "eee",
    }  # fmt: skip


@pytest.mark.parametrize("column", ["image_file", "file_name", "image", "filename"])
def test_a_table_may_call_its_files_so(tmp_path: Path, column: str) -> None:
    table = f"{column},caption\na.png,here\n".encode()
    assert captions(tmp_path, {"a.png": PNG, "caption.csv": table}) == {"a.png": "here"}


def test_an_empty_cell_is_no_caption_and_another_table_is_none(tmp_path: Path) -> None:
    files = {"a.png": PNG, "caption.csv": b"caption,image\n ,a.png\n", "table.csv": b"caption,image\nx,a.png\n"}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == [None]
    assert [item.name for item in skipped] == ["table.csv"]


def test_the_nearest_caption_stays_and_the_others_are_reported(tmp_path: Path) -> None:
    files = {
        "z.png": PNG, "z.txt": b"text", "metadata.jsonl": b'{"file_name": "z.png", "caption": "metadata"}',
        "captions.csv": b"caption,image\ntable,z.png\n",
    }  # fmt: skip
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == ["text"]
    assert reasons(skipped) == dict.fromkeys(
        ["metadata.jsonl", "captions.csv"], "has a caption for 'z.png', which has one"
    )


def test_a_caption_for_no_picture_is_reported(tmp_path: Path) -> None:
    files = {"a.png": PNG, "b.txt": b"lost", "x/a.txt": b"elsewhere", "captions.csv": b"caption,image\nlost,c.png\n"}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == [None]
    assert reasons(skipped) == {
        "b.txt": "has a caption for 'b', which is no picture here",
        "captions.csv": "has a caption for 'c.png', which is no picture here",
        "x/a.txt": "has a caption for 'x/a', which is no picture here",
    }


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metadata.jsonl", b"not json"), ("metadata.jsonl", b'["a.png", "x"]'), ("metadata.jsonl", b"[" * 100_000),
        ("metadata.jsonl", b'{"file_name": "a.png"}'), ("metadata.jsonl", b'{"file_name": 1, "text": "x"}'),
        ("caption.csv", b"name,words\na.png,x\n"), ("caption.csv", b"caption,image\n" + b"x" * 200_000 + b",a.png\n"),
        ("caption.csv", b"caption,image\nonly\n"), ("a.json", b'{"caption": 3}'), ("a.cls", b"7"),
        ("a.txt", b"x" * ((16 << 20) + 1)),
    ],
)  # fmt: skip
def test_a_caption_file_that_cannot_be_read_is_reported(tmp_path: Path, name: str, data: bytes) -> None:
    pictures, skipped = read_upload(in_tar(tmp_path, {"a.png": PNG, name: data}))
    assert [p.caption for p in pictures] == [None]
    assert [(item.name, item.reason.split(":")[0]) for item in skipped] == [(name, "cannot be read")]


# Shards and tables of pictures.


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


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refusal(in_zip(tmp_path, {"t.parquet": b"PAR1"})) == (
        "input_images holds a parquet file, and pyarrow is not installed. Install it, or send images and captions."
    )


class Table:
    """What pyarrow.parquet.ParquetFile is asked for, over rows of our own."""

    rows: list[dict[str, Any]]

    def __init__(self, _: io.BytesIO) -> None:
        self.schema_arrow = types.SimpleNamespace(names=list(self.rows[0]))

    def iter_batches(self, batch_size: int, columns: list[str]) -> list[Any]:
        rows = [{name: row[name] for name in columns} for row in self.rows]
        return [types.SimpleNamespace(to_pylist=lambda: rows[:1]), types.SimpleNamespace(to_pylist=lambda: rows[1:])]


PARQUETS = [
    [{"image": {"bytes": PNG, "path": "x"}, "text": "one"}, {"image": {"bytes": None, "path": "y"}, "text": "two"}],
    [{"id": 1, "image": PNG, "action": "one"}, {"id": 2, "image": None, "action": None}],
]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("rows", PARQUETS)
def test_rows_of_a_parquet_file_are_pictures_with_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], real: bool
) -> None:
    if real:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), buffer)
        data = buffer.getvalue()
    else:
        table = type("Table", (Table,), {"rows": rows})
        monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=table))
        data = b"PAR1"
    pictures, skipped = read_upload(in_zip(tmp_path, {"t.parquet": data}))
    assert [(p.name, p.data, p.caption) for p in pictures] == [("t.parquet/000000", PNG, "one")]
    assert "t.parquet/000001" in reasons(skipped)


def test_a_damaged_parquet_file_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    _, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "t.parquet": b"PAR1" + bytes(100)}))
    assert reasons(skipped)["t.parquet"].startswith("is damaged: ")


# Masks.


def test_masks_go_with_the_picture_of_their_stem(tmp_path: Path) -> None:
    mask = encoded(Image.new("L", (80, 70), 200))
    files = {"a.jpg": encoded(drawn(), "JPEG"), "a.mask.png": mask, "x/b.png": PNG, "x/masks/b.png": mask, "c.png": PNG}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [(p.name, p.mask) for p in pictures] == [("a.jpg", mask), ("c.png", None), ("x/b.png", mask)]
    assert not skipped
    shown = pictures[0].open_mask()
    assert shown is not None
    assert (shown.mode, shown.size, shown.getpixel((0, 0))) == ("L", (80, 70), 200)
    assert pictures[1].open_mask() is None


def test_a_mask_that_fits_no_picture_is_reported_and_never_trained(tmp_path: Path) -> None:
    mask = encoded(Image.new("L", (90, 70)))
    pictures, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "a.mask.png": mask, "masks/b.png": mask}))
    assert [(p.name, p.mask) for p in pictures] == [("a.png", None)]
    assert reasons(skipped) == dict.fromkeys(
        ["a.mask.png", "masks/b.png"], "is a mask, and no picture of its name and size lacks one"
    )


def test_a_transparent_mask_is_black_there() -> None:
    image = Image.new("RGBA", (80, 80), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (40, 0, 80, 80))
    mask = Picture("x", PNG, None, encoded(image)).open_mask()
    assert mask is not None
    assert (mask.getpixel((0, 0)), mask.getpixel((79, 0))) == (0, 255)


# What is learnt.


def test_the_hash_knows_images_captions_and_masks_but_no_names_and_no_order() -> None:
    a, b = Picture("a", b"1", "one", None), Picture("b", b"2", None, b"m")
    same = [[a, b], [b, a], [replace(a, name="z"), b]]
    others = [[a], [a, a, b], [replace(a, data=b"x"), b], [replace(a, caption="x"), b], [replace(a, caption=None), b],
              [replace(a, caption=""), b], [a, replace(b, mask=None)], [a, replace(b, mask=b"x")],
              [replace(a, caption=None), replace(b, caption="one")]]  # fmt: skip
    assert len({dataset_hash(pictures) for pictures in same}) == 1
    assert len({dataset_hash(pictures) for pictures in [same[0], *others]}) == 1 + len(others)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (None, "a sbu dog"), ("a photo of a dog", "sbu, a photo of a dog"), ("a [trigger] dog", "a sbu dog"),
        ("[trigger] and [trigger]", "sbu and sbu"), ("sbu", "sbu"), ("a (sbu) dog", "a (sbu) dog"),
        ("in sbuburbia", "sbu, in sbuburbia"), ("an unsbu", "sbu, an unsbu"), ("SBU", "sbu, SBU"),
    ],
)  # fmt: skip
def test_the_trigger_is_in_every_caption(caption: str | None, expected: str) -> None:
    assert captioned(Picture("x", PNG, caption, None), "sbu", "a [trigger] dog") == expected


def test_a_trigger_is_text_and_no_pattern() -> None:
    assert captioned(Picture("x", PNG, "a cat", None), "s.u(", "") == "s.u(, a cat"
    assert captioned(Picture("x", PNG, "a s.u( cat", None), "s.u(", "") == "a s.u( cat"


def test_a_template_is_taken_at_its_word() -> None:
    assert captioned(Picture("x", PNG, None, None), "sbu", "a dog") == "a dog"
