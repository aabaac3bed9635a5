"""Zeros that would be added to something that is no linear layer change nothing, and are no reason to refuse a file."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klora.errors import LoRAError
from klora.models.family import Family
from test_folder.files.reading import FLUX_Q, GOOD, GOOD_FLUX, Q, assert_same_bits, pair, read
from test_folder.files.spelling import KOHYA, keyed

CLIP = "text_encoders.clip_l.transformer.text_model"
# As ComfyUI extracts a LoRA from a model and its text encoders, of which nobody trained the encoders.
ADDED = {
    f"{CLIP}.encoder.layers.0.layer_norm1.diff": torch.zeros(32, dtype=torch.float16),
    f"{CLIP}.encoder.layers.0.layer_norm1.diff_b": torch.zeros(32, dtype=torch.bfloat16),
    f"{CLIP}.encoder.layers.0.self_attn.q_proj.diff_b": torch.zeros(32, dtype=torch.float8_e4m3fn),
    "diffusion_model.any.bias.diff_b": torch.zeros(7),
    "lora_unet_any_norm.w_norm": torch.zeros(7),
    "lora_unet_any_norm.b_norm": torch.zeros(7),
    "unet.any.lora_B.bias": torch.zeros(7),
}
FILES = {"sdxl": (GOOD, Q), "flux": (GOOD_FLUX, FLUX_Q)}


def embeddings(outputs: int, inputs: int, *, moved: int) -> dict[str, Tensor]:
    """A pair of zeros but for one of its factors, or for both. moved: 0 or 1 for A or B, 2 for both."""
    factors = [part if moved in (i, 2) else part * 0 for i, part in enumerate(pair(outputs, inputs))]
    return keyed(f"{CLIP}.embeddings.position_embedding", (factors[0], factors[1]), KOHYA)


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("moved", [0, 1])
def test_zeros_beside_a_lora_leave_it_alone(families: dict[str, Family], path: Path, family: str, moved: int) -> None:
    tensors, name = FILES[family]
    seen = read(families[family], path, tensors | ADDED | embeddings(77, 32, moved=moved))
    prefix = next(iter(tensors)).split(name)[0]
    assert_same_bits(seen, {name: (tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"])})
    assert not seen.text_encoders


@pytest.mark.parametrize("key", ADDED)
@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_what_is_not_zero_is_refused_by_name(sdxl: Family, path: Path, key: str, value: float) -> None:
    changed = ADDED[key].float().clone()
    changed[-1] = value
    with pytest.raises(LoRAError, match=re.escape(key.rpartition(".")[0])):
        read(sdxl, path, GOOD | {key: changed})


def test_embeddings_that_move_are_refused(sdxl: Family, path: Path) -> None:
    with pytest.raises(LoRAError, match="position_embedding"):
        read(sdxl, path, GOOD | embeddings(77, 32, moved=2))


def test_zeros_alone_are_no_lora(sdxl: Family, path: Path) -> None:
    with pytest.raises(LoRAError, match="holds no tensors"):
        read(sdxl, path, ADDED)
