"""Models that this project does not run, known by the names and shapes in their LoRA files, so that a refusal can name
them. Those that it does run are known to their families."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from klora.files.container import Contents
from klora.files.factors import outline

_CROSS_ATTENTION = {768: "SD 1.5", 1024: "SD 2"}  # width of the text that a U-Net attends to; SDXL's is 2048
_SD3_WIDTHS = (1536, 2432)
_NAMES = {
    r"(^|[._])joint_blocks[._]": "SD 3",
    r"to_qkv_mlp_proj|(double|single)_stream_modulation|ff(_context)?[._]linear_in": "FLUX.2",
    r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._]": "Wan",
}
# Rows for each input where FLUX.2 and FLUX.1 share names: the feed-forward layers of FLUX.2 are gated.
_FLUX2_ROWS = {r"single_blocks[._]\d+[._]linear1$": 9, r"double_blocks[._]\d+[._](img|txt)_mlp[._]0$": 6}
_SAID = {
    r"sd_v1|stable-diffusion-v1": "SD 1.5",
    r"sd_v2|stable-diffusion-v2": "SD 2",
    r"sd3|stable-diffusion-3": "SD 3",
    r"flux-?2": "FLUX.2",
    r"wan": "Wan",
}


class Origin(NamedTuple):
    """The model that a LoRA file was made for. family: a key of klora.models.FAMILIES, None for what they do not run;
    evidence: how that is known, "" where the names of its layers say it."""

    model: str
    family: str | None
    evidence: str

    def __str__(self) -> str:
        return f"{self.model} ({self.evidence})" if self.evidence else self.model


def stranger(contents: Contents) -> Origin | None:
    """The origin of a file that was made for none of our families; None where nothing says so."""
    seen = (found for name, shape in outline(contents.specs).items() for found in _seen(name, *shape))
    return next((Origin(model, None, evidence) for model, evidence in chain(seen, _said(contents.metadata))), None)


def _seen(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, str]]:
    if re.search(r"attn2[._]to_[kv]$", name) and inputs in _CROSS_ATTENTION:
        yield _CROSS_ATTENTION[inputs], f"cross-attention width {inputs}"
    if re.search(r"transformer_blocks[._]\d+[._]attn[._](to|add)_[qkv]", name) and inputs in _SD3_WIDTHS:
        yield "SD 3", f"width {inputs}"
    yield from ((model, f"a layer named {name!r}") for pattern, model in _NAMES.items() if re.search(pattern, name))
    for pattern, rows in _FLUX2_ROWS.items():
        if re.search(pattern, name) and outputs == rows * inputs:
            yield "FLUX.2", f"{rows} rows for each input in {name!r}"


def _said(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        for pattern, model in _SAID.items():
            if re.match(pattern, metadata.get(key, "")):
                yield model, f"{key} is {metadata[key][:40]!r}"
