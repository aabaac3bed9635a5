"""An image of an upload is known by its content and becomes RGB as people see it, or it is skipped."""

import itertools
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from klora.training.dataset import Picture, read_upload
from test_folder.photographs import BGR, ODD_EXIF, SRGB
from test_folder.uploads.packing import PNG, drawn, encoded, in_zip, reasons


def opened(data: bytes) -> Image.Image:
    return Picture("x", data, None, None).open()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF"])
def test_an_image_is_known_by_its_content_and_decodes(tmp_path: Path, format: str) -> None:
    (picture,), skipped = read_upload(in_zip(tmp_path, {"photo.dat": encoded(drawn(), format)}))
    assert not skipped
    assert (picture.open().mode, picture.open().size) == ("RGB", (80, 70))
    assert np.abs(np.asarray(picture.open(), int)[40, 40] - (255, 0, 0)).max() <= 3  # JPEG's own rounding


def test_an_image_of_another_kind_is_skipped(tmp_path: Path) -> None:
    files = {"a.png": PNG, "b.png": encoded(drawn(), "ICO"), "c.ppm": encoded(drawn(), "PPM")}
    assert [p.name for p in read_upload(in_zip(tmp_path, files))[0]] == ["a.png"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF"])
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
    for format, number in itertools.product(("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF"), range(60)):
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


def test_a_picture_is_learnt_in_the_colours_of_its_profile() -> None:
    shown = np.asarray(opened(encoded(drawn(), icc_profile=BGR)), int)
    assert np.abs(shown - np.asarray(drawn(), int)[..., ::-1]).max() <= 1


def test_exif_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = opened(encoded(drawn(), exif=exif))
    assert turned.tobytes() == drawn().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("exif", ODD_EXIF.values(), ids=ODD_EXIF)
def test_an_odd_tag_beside_the_orientation_costs_no_picture(tmp_path: Path, exif: bytes) -> None:
    (picture,), skipped = read_upload(in_zip(tmp_path, {"0.jpg": encoded(drawn(), "JPEG", exif=exif)}))
    assert picture.open().size == (70, 80)
    assert not skipped


def test_transparency_lies_over_white() -> None:
    image = drawn().convert("RGBA")
    image.putalpha(128)
    assert np.abs(np.asarray(opened(encoded(image)), int)[40, 40] - (255, 127, 127)).max() <= 1
    palette = drawn().quantize(4)
    palette.info["transparency"] = palette.getpixel((40, 40))
    assert opened(encoded(palette)).getpixel((40, 40)) == (255, 255, 255)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("profile", [None, SRGB])
def test_half_transparent_colours_of_a_palette_lie_over_white_without_a_warning(profile: bytes | None) -> None:
    """As pngquant and its like write them."""
    palette = Image.new("P", (80, 80))
    palette.putpalette([255, 0, 0])
    data = encoded(palette, transparency=b"\x80", icc_profile=profile)
    assert opened(data).getpixel((0, 0)) == (255, 127, 127)


def test_palettes_grey_and_cmyk_become_rgb() -> None:
    assert opened(encoded(drawn().quantize(4))).getpixel((40, 40)) == (255, 0, 0)
    assert opened(encoded(Image.new("LA", (80, 80), (90, 255)))).getpixel((0, 0)) == (90, 90, 90)
    cmyk = opened(encoded(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))
    assert np.abs(np.subtract(cmyk, (255, 0, 0))).max() <= 3  # JPEG's own rounding


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_greys(format: str) -> None:
    ramp = np.arange(0, 1 << 16, 4, np.uint16).reshape(128, 128)
    assert np.array_equal(np.asarray(opened(encoded(Image.fromarray(ramp), format)))[..., 1], ramp >> 8)


@pytest.mark.parametrize(("level", "grey"), [(-1, 0), (1 << 20, 255), (200 << 8, 200)])
def test_levels_outside_of_sixteen_bits_are_black_and_white(level: int, grey: int) -> None:
    assert opened(encoded(Image.new("I", (80, 80), level), "TIFF")).getpixel((0, 0)) == (grey,) * 3


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_of_another_kind_are_skipped(tmp_path: Path, mode: str) -> None:
    files = {"a.png": PNG, "f.tiff": encoded(Image.new(mode, (80, 80)), "TIFF")}
    assert f"holds {mode} pixels" in reasons(read_upload(in_zip(tmp_path, files))[1])["f.tiff"]


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_the_first_frame_of_an_animation_is_the_picture(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(drawn(), format, save_all=True, append_images=[drawn("blue"), drawn("green")], **options)
    assert opened(data).tobytes() == drawn().tobytes()
