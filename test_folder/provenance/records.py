"""Records of how an image was made, small images that hold them, and images with another record."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from klora.form.request import Request
from klora.studio import save_images
from klora.studio.provenance import Provenance, UsedLoRA, settled

FORMATS = ("png", "jpg", "webp")
SHA256 = "0123456789" + "a" * 54


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def made(folder: Path = Path("nowhere"), loras: Mapping[str, UsedLoRA] | None = None, **given: Any) -> Provenance:
    """Of a request that draws nothing."""
    asked = Request(**{"prompt": "a dog", "seed": 7, "model": "sdxl", **given})
    return Provenance.of(settled(asked, asked.model or "sdxl", 3, 7.5), folder, loras or {}, {})


def saved(told: Provenance, folder: Path, output_format: str) -> Path:
    """A small image that says so."""
    image = Image.new("RGB", (8, 8))
    image.info["provenance"] = told
    return save_images({0: image}, folder, Request("a dog", seed=7, output_format=output_format))[0]


def rewritten(image: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """The same image with another record. change: of it, in place."""
    told = json.loads(Image.open(image).info["klora"])
    change(told)
    chunks = PngInfo()
    chunks.add_text("klora", json.dumps(told))
    Image.open(image).save("other.png", pnginfo=chunks)
    return "other.png"
