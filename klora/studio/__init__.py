"""Bases kept ready, and requests turned into images that say how they were made.

studio   from a request to its images     bases       those that are loaded
sheets   several ways on one sheet        provenance  how an image was made
digests  LoRA files by their content      likeness    an image made again, held against the first
"""

from klora.studio.provenance import Check
from klora.studio.studio import Studio, save_images

__all__ = ["Check", "Studio", "save_images"]
