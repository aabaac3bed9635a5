"""Models that this project does not run, known by the names and shapes in their LoRA files, so that a refusal can name
them. Those that it does run are known to their families."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain, product
from typing import NamedTuple

from klora.files.container import Contents
from klora.files.factors import outline

_LAYERS: Mapping[str, str | Mapping[float, str]] = {  # where names do not tell, by its inputs, or outputs for each
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
_SAID = {"SD 1.5": "sd_v1|stable-diffusion-v1", "SD 2": "sd_v2|stable-diffusion-v2", "SD 3": "sd3|stable-diffusion-3"}
_OTHERS = ("FLUX.2", "Wan", "Qwen-Image", "Z-Image", "HiDream", "Anima", "Hunyuan", "Lumina", "Krea-2", "LTX",
           "Chroma", "Zeta-Chroma", "FIBO", "LongCat")  # these four have FLUX.1's layers  # fmt: skip
# As trainers write them: qwen_image_edit, zimage, flux2_klein_9b.
_SAID |= {model: "[-_. ]?".join(re.split("[-.]", model.lower())) + "(?![a-z])" for model in _OTHERS}


class Origin(NamedTuple):
    """The model that a LoRA file was made for. family: a key of klora.models.FAMILIES, None for what they do not run;
    evidence: how that is known, "" where the names of its layers say it; base: the name that our trainer gives it."""

    model: str
    family: str | None
    evidence: str
    base: str = ""

    def __str__(self) -> str:
        return f"{self.model} ({self.evidence})" if self.evidence else self.model


def stranger(contents: Contents) -> Origin | None:
    """The origin of a file that was made for none of our families; None where nothing says so."""
    seen = (found for name, shape in outline(contents.specs).items() for found in _seen(name, *shape))
    return next((Origin(model, None, evidence) for model, evidence in chain(seen, _said(contents.metadata))), None)


def _seen(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, str]]:
    for pattern, told in _LAYERS.items():
        model = told if isinstance(told, str) else told.get(inputs) or told.get(outputs / max(inputs, 1))
        if model and re.search(pattern, name):
            yield model, f"a layer {name!r} of {outputs} x {inputs}"


def _said(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, (model, pattern) in product(("ss_base_model_version", "modelspec.architecture"), _SAID.items()):
        if re.match(pattern, metadata.get(key, "").lower()):
            yield model, f"{key} is {metadata[key][:40]!r}"
