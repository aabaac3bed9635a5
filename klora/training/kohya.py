"""Writes LoRA files in the format of kohya's sd-scripts, which A1111, Forge, ComfyUI and sd-scripts load.

SDXL's layers keep diffusers' names, which those programs map themselves. FLUX.1's take the names of its first release,
where several of diffusers' layers are rows of one. Knows nothing of reading (klora.lora), of models, or of text
encoders.   O outputs, I inputs, R rank.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from klora.errors import LoRAError
from klora.lora import LowRank, save_tensors

_METADATA = {
    "unet": {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"},
    "transformer": {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"},
}
_FINAL_MODULATION = "final_layer_adaLN_modulation_1"
_MLP_ROWS = 4  # for each row of a query, in every FLUX.1

# {name in the file: the layers that share its rows, from the top}; {} is a block's number
_D, _S = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_FLUX: Mapping[str, tuple[str, ...]] = {
    "double_blocks_{}_img_attn_qkv": (_D + "attn.to_q", _D + "attn.to_k", _D + "attn.to_v"),
    "double_blocks_{}_txt_attn_qkv": (_D + "attn.add_q_proj", _D + "attn.add_k_proj", _D + "attn.add_v_proj"),
    "double_blocks_{}_img_attn_proj": (_D + "attn.to_out.0",),
    "double_blocks_{}_txt_attn_proj": (_D + "attn.to_add_out",),
    "double_blocks_{}_img_mlp_0": (_D + "ff.net.0.proj",),
    "double_blocks_{}_img_mlp_2": (_D + "ff.net.2",),
    "double_blocks_{}_txt_mlp_0": (_D + "ff_context.net.0.proj",),
    "double_blocks_{}_txt_mlp_2": (_D + "ff_context.net.2",),
    "double_blocks_{}_img_mod_lin": (_D + "norm1.linear",),
    "double_blocks_{}_txt_mod_lin": (_D + "norm1_context.linear",),
    "single_blocks_{}_linear1": (_S + "attn.to_q", _S + "attn.to_k", _S + "attn.to_v", _S + "proj_mlp"),
    "single_blocks_{}_linear2": (_S + "proj_out",),
    "single_blocks_{}_modulation_lin": (_S + "norm.linear",),
    # The edges. Stock diffusers, unlike the programs above, skips these on loading.
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in_out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in_in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in_out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in_out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    _FINAL_MODULATION: ("norm_out.linear",),
    "final_layer_linear": ("proj_out",),
}
_PLACES = {layer: (name, i, len(parts)) for name, parts in _FLUX.items() for i, layer in enumerate(parts)}


def save_kohya(
    path: Path,
    layers: Mapping[str, LowRank],
    component: str,
    metadata: Mapping[str, str] = {},
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a denoiser's layers. component: diffusers' name of it, "unet" or "transformer"; dtype: None keeps each
    tensor's. Raises LoRAError, and writes nothing, for a layer that has no name in the format."""
    tensors: dict[str, Tensor] = {}
    for name, pair in (_flat(layers) if component == "unet" else _fused(layers)).items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = pair.A.to("cpu", dtype).contiguous()
        tensors[f"lora_unet_{name}.lora_up.weight"] = pair.B.to("cpu", dtype).contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(pair.rank))
    ranks = {str(pair.rank) for pair in layers.values()}
    rank = ranks.pop() if len(ranks) == 1 else "Dynamic"  # sd-scripts' word for ranks that differ
    save_tensors(path, tensors, {**metadata, **_METADATA[component], "ss_network_dim": rank, "ss_network_alpha": rank})
    return path


def _flat(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    return {name.replace(".", "_"): pair for name, pair in layers.items()}


def _fused(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """FLUX.1's layers as {name in the file: pair}, those that share a name there as one pair."""
    groups: dict[str, list[LowRank | None]] = {}
    for layer, pair in layers.items():
        name, place, count = _place(layer)
        groups.setdefault(name, [None] * count)[place] = _swapped(pair) if name == _FINAL_MODULATION else pair
    return {name: _stacked(parts) for name, parts in groups.items()}


def _place(layer: str) -> tuple[str, int, int]:
    """(name in the file, position among the layers that share it, from 0, number of these)."""
    block = r"(?<=transformer_blocks\.)\d+"
    place = _PLACES.get(re.sub(block, "{}", layer))
    if place is None:
        raise LoRAError(f"{layer!r} has no name in kohya's format. Expected a linear layer of FLUX.1.")
    return place[0].format(*re.findall(block, layer)), *place[1:]


def _swapped(pair: LowRank) -> LowRank:
    """The two halves of the rows exchanged: diffusers has the scale's first, the first release the shift's."""
    return LowRank(pair.A, torch.cat(pair.B.chunk(2)[::-1]))


def _stacked(parts: list[LowRank | None]) -> LowRank:
    """One pair whose B A has each part's B A as its rows, exactly: A's one above the other, B's along the diagonal. A
    part that is not adapted adds rows of zeros to B, and no rank. How many: query, key and value have equally many, and
    if none of them is adapted, as many as the input has features."""
    adapted = [part for part in parts if part is not None]
    rows = next((part.B.shape[0] for part in parts[:3] if part), adapted[0].A.shape[1])
    heights = [rows, rows, rows, _MLP_ROWS * rows]
    blocks = [
        part.B if part else adapted[0].B.new_zeros(height, 0) for part, height in zip(parts, heights, strict=False)
    ]
    return LowRank(torch.cat([part.A for part in adapted]), torch.block_diag(*blocks))
