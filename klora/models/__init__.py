"""The families of base models. Each is one file that answers six questions; one line here adds it."""

from collections.abc import Collection
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import safe_open

from klora.device import default_device, default_dtype
from klora.errors import BaseModelError
from klora.files.container import opened
from klora.files.origin import Origin, foreign_origin
from klora.interruptible import interruptible
from klora.models.family import EVERY_PART, Family, Part, Quantized, checkpoint_in, weightless_encoders
from klora.models.flux import Flux
from klora.models.sdxl import SDXL

FAMILIES: dict[str, type[Family]] = {"sdxl": SDXL, "flux": Flux}


def load_model(
    family: str,
    path: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    parts: Collection[Part] = EVERY_PART,
    quantized: Quantized | None = None,
) -> Family:
    """Load a diffusers-format folder, or only some of its parts; family: a key of FAMILIES. Raises BaseModelError.

    SDXL's weights may all be in one file at its top, under the names that their authors gave them.
    """
    if family not in FAMILIES:
        raise BaseModelError(f"There is no family {family!r}. Expected one of {', '.join(FAMILIES)}.")
    here = torch.device(device or default_device())
    _refuse_incomplete(path := Path(path))
    before = torch.get_default_dtype()

    def load() -> Family:
        with torch.cuda.device(here if here.type == "cuda" else -1):  # a thread's own; quantisers ask for it
            return FAMILIES[family].load(path, here, dtype or default_dtype(here), parts, quantized)

    try:
        if here == torch.device("cuda"):  # the current one, of which every thread has its own
            here = torch.device("cuda", torch.cuda.current_device())
        model = interruptible(load)
    except Exception as error:  # for a damaged folder the libraries raise whatever they stumble on
        raise BaseModelError(f"The base in {path} cannot be loaded as {family}: {error}") from error
    finally:
        torch.set_default_dtype(before)  # diffusers makes models in another, in which an exception would leave torch
    for part, module in model.text_encoders.items():
        stored = sum(not key.endswith("position_ids") for file in weight_files(path / part) for key in _keys(file))
        # transformers fills what is missing with random numbers; of a checkpoint for all parts that is refused above
        if stored < len(list(module.parameters())) and not checkpoint_in(path):
            raise BaseModelError(f"The base in {path} lacks tensors of its {part}. Fetch the base again.")
    return model


def silence_progress_bars() -> None:
    """Keep the libraries' own bars out of a server's log: they end no line, and clients read lines."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def load_shapes(family: str, path: Path) -> Family:
    """A base that can read LoRA files and do nothing else: all its parts have shapes alone, on the meta device. Raises
    BaseModelError."""
    model = load_model(family, path, torch.device("cpu"), parts=())
    model.text_encoders |= weightless_encoders(model.pipe, path)
    return model


def files_read(path: Path) -> list[Path]:
    """The safetensors files that loading a base reads: one that holds all parts, or those of each."""
    checkpoint = checkpoint_in(path)
    return [checkpoint] if checkpoint else [file for part in path.glob("*") for file in weight_files(part)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that loading a part of a base reads: where there are halves, those alone."""
    files = list(folder.glob("*.safetensors"))
    return [file for file in files if ".fp16." in file.name] or files


def _refuse_incomplete(path: Path) -> None:
    """Raise BaseModelError where the libraries would make up a vocabulary."""
    if not (path / "model_index.json").is_file():
        raise BaseModelError(f"{path} is no diffusers-format folder: it has no model_index.json.")
    for part in ("tokenizer", "tokenizer_2"):
        if not any((path / part / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise BaseModelError(f"{path} lacks the vocabulary of its {part}. Fetch the base again.")


def origin_of(path: Path) -> Origin | None:
    """By the header of a LoRA file; None when it tells nothing. Raises LoRAError."""
    with opened(path) as contents:
        if foreign := foreign_origin(contents):
            return foreign
        family = next((name for name, kind in FAMILIES.items() if kind.recognises(list(contents.specs))), None)
    return Origin(FAMILIES[family].name, family, "", contents.metadata.get("base", "")) if family else None


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
