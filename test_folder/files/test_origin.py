"""Files that were made for models which this project does not run are called by those models' names."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from klora.cache import Borrowed
from klora.errors import LoRAError
from klora.form.request import Request
from klora.models import origin_of
from klora.models.family import Family
from klora.studio import Studio
from test_folder import published, tiny
from test_folder.files.reading import GOOD, GOOD_FLUX
from test_folder.files.spelling import KOHYA, PEFT, SPELLINGS, Endings, keyed


def layer(stem: str, outputs: int, inputs: int, endings: Endings = KOHYA) -> dict[str, Tensor]:
    return keyed(stem, (torch.ones(1, inputs), torch.ones(outputs, 1)), endings)


TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
STRANGERS: dict[str, tuple[dict[str, Tensor], dict[str, str], str, str]] = {
    "SD 1.5 of kohya": (layer(TO_K, 320, 768), {}, "SD 1.5", "attn2_to_k' of 320 x 768"),
    "SD 1.5 of diffusers": (
        *(layer(f"unet.{TO_K[10:]}".replace("attn2_to_k", "attn2.to_k"), 320, 768, PEFT), {}),
        *("SD 1.5", "attn2.to_k' of 320 x 768"),
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
    "SD 3.5": (layer("transformer.transformer_blocks.0.attn.to_q", 2432, 2432, PEFT), {}, "SD 3", "2432"),
    "FLUX.2 of BFL's other blocks": (
        layer("lora_unet_double_blocks_0_img_mlp_0", 6 * 64, 64), {}, "FLUX.2", "of 384 x 64",
    ),
    "FLUX.2 of BFL": (layer("lora_unet_single_blocks_0_linear1", 9 * 64, 64), {}, "FLUX.2", "of 576 x 64"),
    "Wan": (layer("diffusion_model.blocks.0.self_attn.q", 64, 64, PEFT), {}, "Wan", "self_attn"),
    "Anima": (layer("lora_unet_blocks_0_cross_attn_output_proj", 64, 64), {}, "Anima", "output_proj"),
    "HiDream": (
        layer("diffusion_model.double_stream_blocks.0.block.attn1.to_q", 64, 64, PEFT), {}, "HiDream", "double_stream",
    ),
}  # fmt: skip
VERSION, ARCHITECTURE = "ss_base_model_version", "modelspec.architecture"
SAID = {  # by trainers, of files whose layers say nothing or what is not so
    "Chroma": ((VERSION, "chroma"), (ARCHITECTURE, "Chroma/lora")),
    "Zeta-Chroma": ((VERSION, "zeta_chroma"),),
    "FIBO": ((VERSION, "fibo"),),
    "Qwen-Image": ((VERSION, "qwen_image_edit"), (ARCHITECTURE, "qwen-image/lora")),
    "Z-Image": ((VERSION, "zimage"),),
    "FLUX.2": ((VERSION, "flux2_klein_9b"),),
    "Krea-2": ((VERSION, "krea2"),),
    "Anima": ((ARCHITECTURE, "anima-base-v1.0/lora"),),
    "Lumina": ((ARCHITECTURE, "lumina-2"),),
    "Hunyuan": ((ARCHITECTURE, "hunyuan-image-2.1"),),
    "SD 3": ((ARCHITECTURE, "stable-diffusion-3-m"), (VERSION, "sd3")),
    "Wan": ((VERSION, "wan_2.2_14b"), (VERSION, "wan21")),
}
STRANGERS |= {
    f"{model} by its header: {said}": (GOOD_FLUX, {key: said}, model, f"{key} is {said!r}")
    for model, headers in SAID.items()
    for key, said in headers
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_stranger_is_called_by_its_name(model: Family, tmp_path: Path, case: str) -> None:
    tensors, metadata, name, evidence = STRANGERS[case]
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    origin = origin_of(tmp_path / "lora.safetensors")
    assert origin and (origin.model, origin.family) == (name, None) and evidence in origin.evidence
    with pytest.raises(LoRAError, match=f"is a LoRA for {name} \\("):
        model.read_lora(tmp_path / "lora.safetensors")


# As the library has them; Qwen-Image has sixty blocks, of which the twenty-first is none of FLUX.1's.
PUBLISHED: Mapping[str, Callable[[], nn.Module]] = {
    "SDXL": published.unet,
    "FLUX.1": published.flux,
    "SD 3": partial(diffusers.SD3Transformer2DModel, num_layers=1, num_attention_heads=24),
    "FLUX.2": partial(diffusers.Flux2Transformer2DModel, num_layers=1, num_single_layers=1),
    "Qwen-Image": partial(diffusers.QwenImageTransformer2DModel, num_layers=21),
    "Z-Image": partial(diffusers.ZImageTransformer2DModel, n_layers=1, n_refiner_layers=1),
    "AuraFlow": partial(diffusers.AuraFlowTransformer2DModel, num_mmdit_layers=1, num_single_dit_layers=1),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_models_layers_say_which_it_is(tmp_path: Path, model: str) -> None:
    with torch.device("meta"):
        shapes = tiny.linear_shapes(PUBLISHED[model]())
    attention = [name for name in shapes if "attn" in name or "attention" in name]
    for stem, endings in (SPELLINGS["civitai"], SPELLINGS["comfy"], SPELLINGS["kohya_unet"]):
        for names in (attention, list(shapes)):
            spelled = [stem.format(component="transformer", name=name, flat=name.replace(".", "_")) for name in names]
            files = [layer(spelled[i], *shapes[name], endings) for i, name in enumerate(names)]
            save_file({key: tensor for file in files for key, tensor in file.items()}, tmp_path / "lora.safetensors")
            origin = origin_of(tmp_path / "lora.safetensors")
            assert origin and (origin.model, bool(origin.family)) == (model, model in ("SDXL", "FLUX.1"))


@pytest.mark.parametrize(
    "said",
    ["sdxl_base_v1-0", "flux1", "flux-1-dev/lora", "stable-diffusion-xl-v1-base/lora", "Flux.1-dev", "animagine"],
)
def test_what_other_headers_say_leaves_a_file_to_its_layers(tmp_path: Path, said: str) -> None:
    metadata = {"ss_base_model_version": said, "modelspec.architecture": said}
    save_file(GOOD_FLUX, tmp_path / "lora.safetensors", metadata)
    assert (origin := origin_of(tmp_path / "lora.safetensors")) and origin.family == "flux"


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
    files = {"style_lora": Borrowed(tmp_path / "lora.safetensors")}
    studio = Studio(lambda *_: ("sdxl", "sdxl", bases / "sdxl"), tmp_path / "no-checker", torch.device("cpu"))
    with pytest.raises(LoRAError) as refusal:
        studio.make(Request("a dog", disable_safety_checker=True), files)
    said = (
        "style_lora was made for SD 1.5 "
        f"(a layer '{TO_K}' of 320 x 768), but this request runs sdxl. Expected one for SDXL."
    )
    assert str(refusal.value) == said and not studio.resident
