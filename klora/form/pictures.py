"""The pictures that people upload, as they saw them: turned upright, in sRGB, over a backdrop. Knows no model."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from klora.errors import RequestError

MODES = {"image": "RGB", "mask": "L"}
"""Of pictures that a request works with, by input."""

MAX_PIXELS = 64 << 20  # of an uploaded image, once decoded


def open_images(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A request's inputs, its image and mask opened: they come as paths. Raises RequestError."""
    return {**inputs, **{name: open_image(name, inputs[name], mode) for name, mode in MODES.items() if name in inputs}}


def open_image(name: str, path: Path, mode: str) -> Image.Image:
    """An upload as its maker saw it, turned as its EXIF says, in this mode. Raises RequestError naming the input."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "AVIF")) as file:
            if file.width * file.height > MAX_PIXELS:
                raise RequestError(f"{name} has {file.width}x{file.height} pixels. Expected at most {MAX_PIXELS}.")
            return flat(upright(file), mode)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name} has more than {MAX_PIXELS} pixels. Expected at most so many.") from error
    except Exception as error:  # of a damaged file Pillow raises whatever it stumbles on
        raise RequestError(f"{name} cannot be read as an image. Expected a PNG, JPEG, WebP or AVIF file.") from error


def upright(file: Image.Image) -> Image.Image:
    """A file's image, turned as its EXIF says, of which nothing is kept. Raises what Pillow does of damaged files."""
    file.load()  # a PNG may have it behind its pixels
    file.getexif()  # kept by Pillow, which reads it no more, and does not write it again: odd tags break that
    for name in ("exif", "Raw profile type exif"):
        file.info.pop(name, None)
    return ImageOps.exif_transpose(file)


def flat(picture: Image.Image, mode: str) -> Image.Image:
    """In this one of MODES, over white; what is transparent in a mask is not repainted."""
    return opaque(picture, "white" if mode == "RGB" else "black").convert(mode)


def opaque(image: Image.Image, backdrop: str) -> Image.Image:
    """RGB, in sRGB, over a backdrop of this colour."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # at once, because Pillow warns of alpha that a palette loses on its way to RGB
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = _in_srgb(image, profile) if profile else image.convert("RGB")
    image.info.pop("icc_profile", None)
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, backdrop), image).convert("RGB")
    return image


def framed(image: Image.Image | None, mask: Image.Image | None, size: tuple[int, int]) -> dict[str, Image.Image]:
    """What is given of "image" and its "mask", as that lies on the image: cut about their middle to the shape of this
    size in pixels, for nothing is to be stretched, and resized to it."""
    if image is None:
        return {}
    given = {"image": ImageOps.fit(image, size, Image.Resampling.LANCZOS)}
    if mask:  # bilinear, because Lanczos rings: an edge would leave traces where the mask is black
        bilinear = Image.Resampling.BILINEAR
        given["mask"] = ImageOps.fit(mask.resize(image.size, bilinear), size, bilinear)
    return given


def cellwise(mask: Image.Image, side: int) -> Image.Image:
    """A mask where each square of so many pixels a side is as white as its whitest: of a latent cell pipelines ask one
    pixel alone, and would pass over a fine line. overlaid() keeps the others."""
    cells = np.asarray(mask).reshape(mask.height // side, side, mask.width // side, side).max((1, 3))
    return Image.fromarray(cells).resize(mask.size, Image.Resampling.NEAREST)


def overlaid(images: list[Image.Image], given: Mapping[str, Image.Image]) -> list[Image.Image]:
    """The images, over the one that is framed() where its mask is black: the VAE alters what is to be kept, too."""
    return [Image.composite(image, given["image"], given["mask"]) for image in images] if "mask" in given else images


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB, of an image whose numbers mean what an ICC profile says: a telephone's are not sRGB's, nor are a press's. A
    profile that is damaged, or of another kind of image, is not heeded, as in browsers."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        grey = source.profile.xcolor_space == "GRAY" and image.mode in ("1", "L", "LA")
        numbers = image if image.mode == "CMYK" else image.convert("L" if grey else "RGB")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, srgb, numbers.mode, "RGB", intent, flags).apply(numbers)
    except (ImageCms.PyCMSError, OSError, ValueError):  # the last of a name that is no ASCII
        return image.convert("RGB")
