"""Models that this project does not run, known by the names and shapes in their LoRA files, so that a refusal can name
them. Those that it does run are known to their families."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain, product
from typing import NamedTuple

from klora.files.container import Contents
from klora.files.factors import outline

# {pattern of a module's name: model}, or, where names do not tell, {its inputs, or outputs / inputs: model}
_LAYERS: Mapping[str, str | Mapping[float, str]] = {
    r"attn2[._]to_[kv]$": {768: "SD 1.5", 1024: "SD 2"},  # texts' widths; SDXL's is 2048
    r"transformer_blocks[._]\d+[._]attn[._](to|add)_[qkv]": {1536: "SD 3", 2432: "SD 3"},
    r"(?<!single_)transformer_blocks[._][2-5]\d[._]attn[._]": {3072: "Qwen-Image"},  # FLUX.1 has nineteen blocks
    r"(^|[._])layers[._]\d+[._](attention|feed_forward)[._]": {3840: "Z-Image"},
    r"single_blocks[._]\d+[._]linear1$": {9: "FLUX.2"},  # whose feed-forward layers are gated
    r"double_blocks[._]\d+[._](img|txt)_mlp[._]0$": {6: "FLUX.2"},
    r"to_qkv_mlp_proj|(double|single)_stream_modulation|ff(_context)?[._]linear_in": "FLUX.2",
    r"(^|[._])joint_blocks[._]": "SD 3",
    r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]": "Qwen-Image",
    r"(double|single)_stream_blocks[._]": "HiDream",
    r"joint_transformer_blocks[._]": "AuraFlow",
    r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._]\w+_proj$": "Anima",
    r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._]": "Wan",
}
# {model: pattern of what metadata calls it}
_NAMES = {"SD 1.5": "sd_v1|stable-diffusion-v1", "SD 2": "sd_v2|stable-diffusion-v2", "SD 3": "sd3|stable-diffusion-3"}
_OTHERS = ("FLUX.2", "Wan", "Qwen-Image", "Z-Image", "HiDream", "Anima", "Hunyuan", "Lumina", "Krea-2", "LTX",
           "Chroma", "Zeta-Chroma", "FIBO", "LongCat")  # these four have FLUX.1's layers  # fmt: skip
# As trainers write them: qwen_image_edit, zimage, flux2_klein_9b.
_NAMES |= {model: "[-_. ]?".join(re.split("[-.]", model.lower())) + "(?![a-z])" for model in _OTHERS}


class Origin(NamedTuple):
    """The model that a LoRA file was made for. family: a key of klora.models.FAMILIES, None for another model;
    evidence: what shows it, in words, "" where it is the names of a family's layers; base: the name of the base model
    in the header of our trainer's files, else ""."""

    model: str
    family: str | None
    evidence: str
    base: str = ""

    def __str__(self) -> str:
        return f"{self.model} ({self.evidence})" if self.evidence else self.model


def foreign_origin(contents: Contents) -> Origin | None:
    """The origin of a file that was made for a model which this project does not run; None where nothing says so."""
    layers = (found for name, shape in outline(contents.specs).items() for found in _by_layer(name, *shape))
    return next((Origin(model, None, why) for model, why in chain(layers, _by_metadata(contents.metadata))), None)


def _by_layer(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, str]]:
    """(model, evidence) of the models that have a layer of this name and shape."""
    for pattern, models in _LAYERS.items():
        model = models if isinstance(models, str) else models.get(inputs) or models.get(outputs / max(inputs, 1))
        if model and re.search(pattern, name):
            yield model, f"a layer {name!r} of {outputs} x {inputs}"


def _by_metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(model, evidence) of the models that the metadata names."""
    for key, (model, pattern) in product(("ss_base_model_version", "modelspec.architecture"), _NAMES.items()):
        if re.match(pattern, metadata.get(key, "").lower()):
            yield model, f"{key} is {metadata[key][:40]!r}"
