"""Captions and masks of training pictures by small models, BLIP and CLIPSeg. Each is used, then dropped.

Knows nothing of Cog, of archives or of the training loop.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

from klora.errors import BaseModelError
from klora.interruptible import interruptible
from klora.training.dataset import Picture

MAX_NEW_TOKENS = 50
PUNCTUATION = ",.;:!?"


@dataclass(frozen=True)
class _Annotator:
    model: Any
    tokenizer: Any
    processor: Any

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt").pixel_values.to(self.model.device)


class Captioner(_Annotator):
    """Describes a picture in one line."""

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read a BLIP captioning model's folder. Raises BaseModelError."""
        advice = "Install a BLIP captioning model there, or set autocaption=false."
        kinds = (hf.BlipForConditionalGeneration, hf.BertTokenizer, hf.BlipImageProcessorPil)
        return cls(*_loaded("The captioner", folder, device, kinds, advice))

    @torch.no_grad()
    def caption(self, image: Image.Image) -> str:
        """The picture's caption; always the same one, because decoding is greedy."""
        options = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "do_sample": False}
        tokens = self.model.generate(self._pixels(image), **options)[0, 1:]  # the first marks the start
        # Cleaning up makes "man ' s" into "man's".
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        return " ".join(text.split())


class Segmenter(_Annotator):
    """Finds what a prompt names in a picture."""

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read a CLIPSeg model's folder. Raises BaseModelError."""
        advice = "Install a CLIPSeg model there, or choose another mask_mode."
        kinds = (hf.CLIPSegForImageSegmentation, hf.CLIPTokenizer, hf.ViTImageProcessorPil)
        return cls(*_loaded("The segmenter", folder, device, kinds, advice))

    @torch.no_grad()
    def mask(self, image: Image.Image, prompt: str) -> Image.Image:
        """L, as large as the picture, the whiter the likelier a pixel shows what the prompt names."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        probabilities = torch.sigmoid(self.model(**tokens, pixel_values=self._pixels(image)).logits)
        size = (image.height, image.width)
        probabilities = F.interpolate(probabilities[:, None], size=size, mode="bilinear", antialias=True)[0, 0]
        return Image.fromarray((probabilities * 255).round().byte().cpu().numpy())


def autocaptioned(pictures: Iterable[Picture], captioner: Captioner, prefix: str, suffix: str) -> list[Picture]:
    """Every picture with a caption: its own as it is, or the captioner's between prefix and suffix."""

    def text(picture: Picture) -> str | None:
        return reduce(_joined, (prefix, captioner.caption(picture.open()), suffix)).strip() or None

    return [picture if picture.caption else replace(picture, caption=text(picture)) for picture in pictures]


def segmented(pictures: Iterable[Picture], segmenter: Segmenter, prompt: str) -> list[Picture]:
    """Every picture with a mask: its own as it is, or the segmenter's."""

    def mask(picture: Picture) -> bytes:
        segmenter.mask(picture.open(), prompt).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    return [replace(picture, mask=mask(picture)) if picture.mask is None else picture for picture in pictures]


def _joined(before: str, after: str) -> str:
    """Two parts of a caption with a comma between them, or a space, or nothing where they are separated already."""
    if not before or not after or before[-1].isspace() or after[0].isspace() or after[0] in PUNCTUATION:
        return before + after
    return f"{before} {after}" if before[-1] in PUNCTUATION else f"{before}, {after}"


def _loaded(name: str, folder: Path, device: torch.device, kinds: tuple[Any, Any, Any], advice: str) -> list[Any]:
    """Model, tokenizer and image processor, of these kinds. name: begins an error's sentence, and advice ends it."""
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{name} is not installed: {folder} has no config.json. {advice}")
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    options |= {"local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        model, info = interruptible(partial(kinds[0].from_pretrained, folder, **options))
        tokenizer, processor = (kind.from_pretrained(folder, local_files_only=True) for kind in kinds[1:])
    except Exception as error:  # transformers has no kind of its own for damaged files
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise BaseModelError(f"{name} cannot be loaded from {folder}: {reason}. {advice}") from error
    if flaw := _flaw(model, info, tokenizer):
        raise BaseModelError(f"{name} in {folder} {flaw}. {advice}")
    return [model.to(device).eval().requires_grad_(False), tokenizer, processor]


def _flaw(model: Any, info: dict[str, Any], tokenizer: Any) -> str | None:
    """What is wrong with a model's files that transformers loads all the same, with random weights or an empty
    vocabulary in place of what is missing; None if nothing is."""
    if bad := [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]:
        return f"lacks {min(bad)} in the shape that its config.json gives"
    if bad := [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]:
        return f"has values in {min(bad)} that are not finite"
    seen, stated = len(tokenizer), model.config.text_config.vocab_size  # of BLIP two more than its tokenizer has
    return f"has a tokenizer of {seen} tokens where its config.json gives {stated}" if 2 * seen < stated else None
