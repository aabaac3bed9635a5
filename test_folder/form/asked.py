"""Requests as a form asks for them, and every bound and choice that it has."""

from typing import Any

from PIL import Image

from klora.form.request import Request

RATIOS = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216),
    "4:5": (896, 1088), "5:4": (1088, 896), "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344),
    "9:21": (640, 1536),
}  # fmt: skip
CHOICES = {
    "model": ["sdxl", "illustrious-xl", "flux-dev", "flux-schnell"],
    "fusion": ["klora", "sum", "content", "style"],
    "pattern": ["auto", "s", "s*"],
    "aspect_ratio": [*RATIOS, "custom", "match_input_image"],
    "megapixels": ["0.25", "0.5", "1", "2"],
    "scheduler": ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM"],
    "output_format": ["webp", "jpg", "png"],
}
PICTURE = Image.new("RGB", (300, 100))


def request(**given: Any) -> Request:
    return Request(**{"prompt": "a dog", **given})
