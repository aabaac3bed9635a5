"""Files that were made for models which this project does not run are called by those models' names."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError
from klora.form.request import Request
from klora.models import origin_of
from klora.models.family import Family
from klora.studio import Studio
from test_folder.files.reading import GOOD, GOOD_FLUX
from test_folder.files.spelling import KOHYA, PEFT, keyed


def layer(stem: str, outputs: int, inputs: int, endings: tuple[str, str] = KOHYA) -> dict[str, Tensor]:
    return keyed(stem, (torch.ones(1, inputs), torch.ones(outputs, 1)), endings)


TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
STRANGERS: Mapping[str, tuple[dict[str, Tensor], dict[str, str], str, str]] = {
    "SD 1.5 of kohya": (layer(TO_K, 320, 768), {}, "SD 1.5", "cross-attention width 768"),
    "SD 1.5 of diffusers": (
        *(layer(f"unet.{TO_K[10:]}".replace("attn2_to_k", "attn2.to_k"), 320, 768, PEFT), {}),
        *("SD 1.5", "cross-attention width 768"),
    ),
    "SD 2": (layer(TO_K, 320, 1024), {}, "SD 2", "1024"),
    "SD 1.5 by its header": (
        layer(TO_K[:-12] + "proj_in", 320, 320), {"ss_base_model_version": "sd_v1"}, "SD 1.5", "sd_v1",
    ),
    "SD 3 of kohya": (layer("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536), {}, "SD 3", "joint_blocks"),
    "SD 3 of diffusers": (layer("transformer.transformer_blocks.0.attn.to_q", 1536, 1536, PEFT), {}, "SD 3", "1536"),
    "FLUX.2 of diffusers": (
        layer("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 64, 32, PEFT), {}, "FLUX.2", "qkv_mlp",
    ),
    "FLUX.2 of BFL": (layer("lora_unet_single_blocks_0_linear1", 9 * 64, 64), {}, "FLUX.2", "9 rows"),
    "Wan": (layer("diffusion_model.blocks.0.self_attn.q", 64, 64, PEFT), {}, "Wan", "self_attn"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGERS)
def test_a_stranger_is_called_by_its_name(model: Family, tmp_path: Path, case: str) -> None:
    tensors, metadata, name, evidence = STRANGERS[case]
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    origin = origin_of(tmp_path / "lora.safetensors")
    assert origin and (origin.model, origin.family) == (name, None) and evidence in origin.evidence
    with pytest.raises(LoRAError, match=f"is a LoRA for {name} \\("):
        model.read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(("tensors", "name"), [(GOOD, "SDXL"), (GOOD_FLUX, "FLUX.1")])
def test_our_own_are_none(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    origin = origin_of(tmp_path / "lora.safetensors")
    assert origin and origin.model == name and origin.family


def test_flux1s_own_rows_are_no_flux2(tmp_path: Path) -> None:
    save_file(layer("lora_unet_single_blocks_0_linear1", 7 * 64, 64), tmp_path / "lora.safetensors")
    origin = origin_of(tmp_path / "lora.safetensors")
    assert origin and origin.model == "FLUX.1"


def test_a_request_says_what_the_file_is_and_what_it_runs(bases: Path, tmp_path: Path) -> None:
    tensors, metadata, _, _ = STRANGERS["SD 1.5 of kohya"]
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    studio = Studio(lambda name, family: ("sdxl", "sdxl", bases / "sdxl"), tmp_path / "no-checker", torch.device("cpu"))
    with pytest.raises(LoRAError) as refusal:
        studio.make(Request("a dog", disable_safety_checker=True), {"style_lora": tmp_path / "lora.safetensors"})
    said = (
        "style_lora was made for SD 1.5 (cross-attention width 768), but this request runs sdxl. Expected one for SDXL."
    )
    assert str(refusal.value) == said and not studio.resident
