"""What the tests send and get back: pictures, zips, data URIs. Knows no server."""

import base64
import io
import re
import urllib.request
import zipfile
from collections.abc import Sequence

import numpy as np
from PIL import Image


def data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def content_of(uri: str) -> tuple[str, bytes]:
    """(MIME type, bytes) of an output: a data URI, or an address to which the server has uploaded it."""
    with urllib.request.urlopen(uri, timeout=60) as response:  # reads data URIs, too
        return response.headers.get_content_type(), response.read()


def in_order(outputs: Sequence[str]) -> list[str]:
    """Outputs as they were made: uploads come as they were done, and their names tell their places."""
    places = {uri: re.search(r"/klora_\d+_(\d+)\.\w+$", uri) for uri in outputs if not uri.startswith("data:")}
    return sorted(outputs, key=lambda uri: int(places[uri][1]) if uri in places else 0)


def image_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(content_of(uri)[1]))


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(image_of(uri))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def gradient(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Black at the top, white at the bottom."""
    return Image.linear_gradient("L").resize(size).convert("RGB")


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """What no archive makes smaller."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def zipped(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def upload(*files: tuple[str, bytes]) -> str:
    """A zip as a data URI."""
    return data_uri(zipped(*files), "application/zip")


def pictures(count: int = 3) -> list[tuple[str, bytes]]:
    """Small pictures of one colour each, by name."""
    colours = ("red", "green", "blue", "white", "black")[:count]
    return [(f"{name}.png", encoded(Image.new("RGB", (96, 80), name))) for name in colours]
