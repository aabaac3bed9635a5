"""Bases kept ready, and requests turned into images that say how they were made.

studio  loaded bases, from a request to its images     shelf  the LoRAs used last     provenance  how an image was made
"""

from klora.studio.studio import Studio, save_images

__all__ = ["Studio", "save_images"]
