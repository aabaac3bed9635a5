"""Every kind of picture that is uploaded becomes RGB or grey, or is refused."""

import io
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from klora.errors import RequestError
from klora.form.pictures import flat, open_image
from klora.form.request import Request
from test_folder.photographs import BGR, ODD_EXIF, SRGB


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int) -> bytes:
    """A PNG of 41 bytes that declares this size and ends where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT"


def upload_refusal(path: Path, mode: str = "RGB") -> str:
    with pytest.raises(RequestError) as error:
        open_image("mask", path, mode)
    return str(error.value)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_270),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_an_upload_is_turned_as_its_exif_says(tmp_path: Path, orientation: int, turn: Image.Transpose | None) -> None:
    stored = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image("image", save(tmp_path / "photo.png", stored, exif=exif), "RGB")
    assert np.array_equal(opened, stored if turn is None else stored.transpose(turn))


@pytest.mark.parametrize("exif", ODD_EXIF.values(), ids=ODD_EXIF)
@pytest.mark.parametrize("kept", ["jpg", "png", "profile"])
def test_an_odd_tag_beside_the_orientation_hinders_nothing(tmp_path: Path, kept: str, exif: bytes) -> None:
    """Pillow would write all tags again; ImageMagick keeps them in a text of the PNG."""
    profile = PngInfo()
    profile.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    options = {"png": {"exif": exif}, "jpg": {"exif": exif}, "profile": {"pnginfo": profile, "format": "PNG"}}[kept]
    path = save(tmp_path / f"photo.{kept}", Image.new("RGB", (8, 4)), **options)
    assert open_image("image", path, "RGB").size == (4, 8)


def test_exif_behind_the_pixels_is_of_the_picture_too(tmp_path: Path) -> None:
    chunk = b"eXIf" + next(iter(ODD_EXIF.values()))[6:]
    behind = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = save(tmp_path / "photo.png", Image.new("RGB", (8, 4)), exif=next(iter(ODD_EXIF.values())))
    path.write_bytes(path.read_bytes()[:-12] + behind + path.read_bytes()[-12:])
    assert open_image("image", path, "RGB").size == (4, 8)


def test_what_pillow_stumbles_on_is_refused_in_the_same_sentence(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)  # more than Pillow unpacks: a ValueError
    path = save(tmp_path / "photo.png", Image.new("RGB", (8, 4)), pnginfo=text)
    assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG, WebP or AVIF file."


RED = (255, 0, 0)
STORED = {
    "RGB": Image.new("RGB", (4, 4), RED),
    "palette": Image.new("RGB", (4, 4), RED).quantize(8),
    "alpha": Image.new("RGBA", (4, 4), (*RED, 255)),
    "bits": Image.new("1", (4, 4), 1),
    "grey": Image.new("L", (4, 4), 200),
    "grey and alpha": Image.new("LA", (4, 4), (200, 255)),
}
SEEN = {"bits": (255, 255, 255), "grey": (200, 200, 200), "grey and alpha": (200, 200, 200)}


@pytest.mark.parametrize("kind", STORED)
def test_every_kind_of_pixel_becomes_rgb_or_grey(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "image.png", STORED[kind])
    rgb, grey = open_image("image", path, "RGB"), open_image("mask", path, "L")
    assert (rgb.mode, rgb.getpixel((1, 1))) == ("RGB", SEEN.get(kind, RED))
    assert grey.mode == "L"
    assert grey.getpixel((1, 1)) == ImageOps.grayscale(rgb).getpixel((1, 1))


def test_where_nothing_is_an_image_is_white_and_a_mask_keeps(tmp_path: Path) -> None:
    path = save(tmp_path / "clear.png", Image.new("RGBA", (4, 4), (250, 0, 0, 0)))
    assert open_image("image", path, "RGB").getcolors() == [(16, (255, 255, 255))]
    assert open_image("mask", path, "L").getcolors() == [(16, 0)]


def test_print_colours_become_rgb(tmp_path: Path) -> None:
    path = save(tmp_path / "image.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert np.abs(np.asarray(open_image("image", path, "RGB"), int) - RED).max() <= 2


# Of greys, whose numbers are the light itself: the curve is y = x.
CURVE = struct.pack(">4sIHH5i", b"para", 0, 3, 0, 1 << 16, 1 << 16, 0, 1 << 16, 0)
LINEAR = SRGB.replace(b"rTRC", b"kTRC").replace(b"RGB XYZ ", b"GRAYXYZ ")
LINEAR = re.sub(re.escape(CURVE[:10]) + b".{22}", lambda match: CURVE, LINEAR, flags=re.DOTALL)


@pytest.mark.parametrize("suffix", ["png", "webp", "avif", "tiff"])
def test_a_pictures_numbers_mean_what_its_profile_says(suffix: str) -> None:
    """Those of telephones are Display P3's, of many cameras Adobe RGB's."""
    shown = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shown[..., ::-1]).save(
        buffer, suffix, icc_profile=BGR, lossless=True, quality=100, subsampling="4:4:4"
    )
    with Image.open(buffer) as file:
        assert np.abs(np.asarray(flat(file, "RGB"), int) - shown).mean() < 2


def test_transparent_and_grey_pictures_have_profiles_too(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    opened = open_image("image", save(tmp_path / "clear.png", clear, icc_profile=BGR), "RGB")
    assert opened.getpixel((0, 0)) == (127, 127, 255)
    for grey in (Image.new("L", (4, 4), 55), Image.new("LA", (4, 4), (55, 255))):
        light = open_image("image", save(tmp_path / "grey.png", grey, icc_profile=LINEAR), "RGB").getpixel((0, 0))
        assert light == pytest.approx((255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055),) * 3, abs=1)


@pytest.mark.parametrize(
    ("image", "profile"),
    [
        (Image.new("RGB", (4, 4), RED), b"no profile"),
        (Image.new("RGB", (4, 4), RED), BGR.replace(b"RGB XYZ ", b"RG\xff XYZ ")),
        (Image.new("RGB", (4, 4), RED), LINEAR),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), BGR),
        (Image.new("L", (4, 4), 200), SRGB),
    ],
    ids=["damaged", "of no colours", "of greys", "not of print", "sRGB"],
)
def test_a_profile_of_another_kind_or_of_srgb_changes_nothing(image: Image.Image, profile: bytes) -> None:
    image.info["icc_profile"] = profile
    assert np.array_equal(flat(image, "RGB"), image.convert("RGB"))


def test_a_requests_picture_is_in_srgb_and_stays_as_it_is() -> None:
    picture = Image.new("RGB", (64, 64), RED)
    picture.info["icc_profile"] = BGR
    request = Request("a dog", image=picture)
    assert request.image is not None and request.image.getpixel((0, 0)) == (0, 0, 255)
    assert replace(request, seed=1).image is request.image and "icc_profile" in picture.info


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "mpo"])
def test_what_cameras_and_programs_write_is_opened(tmp_path: Path, suffix: str) -> None:
    opened = open_image("image", save(tmp_path / f"image.{suffix}", Image.new("RGB", (16, 8), (200, 100, 50))), "RGB")
    assert opened.size == (16, 8)
    assert np.abs(np.asarray(opened, int) - (200, 100, 50)).max() <= 4  # what all but png lose


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.uint16([[0, 0x8000, 0xFFFF]]))
    opened = np.asarray(open_image("image", save(tmp_path / "deep.png", grey), mode), int)
    assert opened.reshape(3, -1)[:, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"image.{suffix}", Image.fromarray(noise))
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG, WebP or AVIF file."


@pytest.mark.parametrize(
    "text",
    [
        "just words",
        "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "P6 is what this note begins with",
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8",
    ],
)
def test_a_text_file_is_refused_whatever_it_is_called(tmp_path: Path, text: str) -> None:
    path = tmp_path / "image.png"
    path.write_text(text)
    assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG, WebP or AVIF file."


@pytest.mark.parametrize("name", ["no-such-file.png", "."])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    assert upload_refusal(tmp_path / name).startswith("mask cannot be read as an image.")


def test_a_size_that_is_only_declared_is_enough_to_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(8192, 8193))
    assert upload_refusal(path) == "mask has 8192x8193 pixels. Expected at most 67108864."
    path.write_bytes(png(8192, 8192))
    assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG, WebP or AVIF file."
    path.write_bytes(png(65535, 65535))
    assert upload_refusal(path) == "mask has more than 67108864 pixels. Expected at most so many."


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "RGB"])
def test_pictures_of_any_mode_that_a_program_gives_are_taken_as_uploads_are(mode: str) -> None:
    picture = Image.new(mode, (8, 8))
    request = Request("a dog", image=picture, mask=picture)
    assert (request.image.mode, request.mask.mode) == ("RGB", "L")
    assert request.image.getpixel((0, 0)) == ((255,) * 3 if mode in ("RGBA", "LA", "CMYK") else (0,) * 3)


@pytest.mark.parametrize("name", ["image", "mask"])
def test_what_is_no_picture_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name} is 'a.png'\. Expected an image that Pillow has opened\.$"):
        Request("a dog", **{name: "a.png"})
