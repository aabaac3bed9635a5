"""The CompVis safety checker, for every family. Fail-closed: what cannot be checked is not shown."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessorPil

from klora.errors import SafetyError
from klora.interruptible import interruptible

_ADVICE = "Fetch it by script/download-weights safety-checker, or set disable_safety_checker=true."


class SafetyChecker:
    """Says which images may not be shown."""

    def __init__(self, model: StableDiffusionSafetyChecker, processor: CLIPImageProcessorPil) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "SafetyChecker":
        """Read the checker's folder. Raises SafetyError."""
        if not (path / "config.json").is_file():
            raise SafetyError(f"The safety checker is not installed. {_ADVICE}")
        try:
            read = partial(StableDiffusionSafetyChecker.from_pretrained, path, local_files_only=True)
            model, info = interruptible(partial(read, use_safetensors=True, output_loading_info=True))
            processor = CLIPImageProcessorPil.from_pretrained(path, local_files_only=True)
        except Exception as error:  # for a damaged folder the libraries raise whatever they stumble on
            raise SafetyError(f"The safety checker cannot be loaded: {error} {_ADVICE}") from error
        if info["missing_keys"]:  # transformers would fill them with random numbers, which flag nothing
            raise SafetyError(f"The safety checker lacks {min(info['missing_keys'])}. {_ADVICE}")
        if not all(parameter.isfinite().all() for parameter in model.parameters()):  # NaN flags nothing either
            raise SafetyError(f"The safety checker has values that are not finite. {_ADVICE}")
        return cls(model.to(device).eval(), processor)

    def flagged(self, images: list[Image.Image]) -> list[bool]:
        """True for each image that may not be shown. Raises SafetyError when the check itself fails."""
        try:
            pixels = self.processor(images, return_tensors="pt").pixel_values.to(self.model.device)
            # The second argument is what the checker blacks out in place: a stand-in, since flagged images are dropped.
            _, flags = self.model(clip_input=pixels, images=np.zeros((len(images), 1)))
        except (RuntimeError, ValueError) as error:
            raise SafetyError(f"The safety checker failed: {error} {_ADVICE}") from error
        return [bool(flag) for flag in flags]
