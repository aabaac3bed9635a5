"""kohya's file holds the same update as the layers it was made of, for our reader and for diffusers' own."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from klora import Flux, LowRank, attached, load_model
from klora.errors import LoRAError
from klora.lora import Plan
from klora.models.family import Family
from klora.training.kohya import save_kohya
from test_folder import tiny

CPU = torch.device("cpu")
IMAGE_QKV = tuple(f"transformer_blocks.1.attn.to_{part}" for part in "qkv")
TEXT_QKV = tuple(f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv")
QKV_MLP = tuple(f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
# diffusers knows the rows of linear1 for FLUX.1's own width alone, so single blocks are read in that width.
CASES = {  # patterns of the adapted layers' names
    "sdxl attention": ("sdxl", r".*\battn\d\."),
    "sdxl all": ("sdxl", ""),
    "flux attention": ("flux", r"transformer_.*\battn\."),
    "flux all but single blocks": ("flux", r"(?!single_)"),
    "single attention": ("wide", r"single_.*\battn\."),
    "single all": ("wide", "single_"),
    "double to_q": ("flux", r"transformer_.*\.to_q"),
    "double add_v_proj": ("flux", r"transformer_.*\.add_v"),
    "single to_q": ("wide", r"single_.*\.to_q"),
    "single proj_mlp": ("wide", r"single_.*\.proj_mlp"),
}
# Stock diffusers maps neither SDXL's add_embedding in kohya's spelling nor the layers outside FLUX.1's blocks.
STOCK = {
    "sdxl": ("sdxl", StableDiffusionXLPipeline, "(?!add_embedding)"),
    "double": ("flux", FluxPipeline, "transformer_"),
    "single": ("wide", FluxPipeline, "single_"),
    "single in part": ("wide", FluxPipeline, r"single_.*\.(to_v|proj_mlp)"),
}
FUSED = {
    "double_blocks_1_img_attn_qkv": IMAGE_QKV,
    "double_blocks_1_txt_attn_qkv": TEXT_QKV,
    "single_blocks_0_linear1": QKV_MLP,
}


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    """The tiny bases, and "wide": one single block, as wide as FLUX.1's."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=0, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32
        )
    transformer.to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in transformer.parameters():
        nn.init.normal_(weight, std=0.02, generator=generator)
    models = {"sdxl": load_model("sdxl", bases / "sdxl", CPU), "flux": load_model("flux", bases / "flux-dev", CPU)}
    return models | {"wide": Flux(FluxPipeline.from_pretrained(bases / "flux-dev", transformer=transformer))}


def drawn(shapes: Mapping[str, tuple[int, int]], rank: int = 2) -> dict[str, LowRank]:
    return {name: LowRank(*factors) for name, factors in tiny.random_lora(shapes, rank, seed=0, std=0.02).items()}


def layers_of(model: Family, wanted: str) -> dict[str, LowRank]:
    shapes = tiny.linear_shapes(model.denoiser)
    return drawn({name: shape for name, shape in shapes.items() if re.match(wanted, name)})


def square(names: Iterable[str], rank: int = 2) -> dict[str, LowRank]:
    return drawn({name: (32 if "mlp" in name else 8, 8) for name in names}, rank)


def dense(pair: LowRank) -> Tensor:
    return pair.B @ pair.A


@pytest.mark.parametrize(("base", "wanted"), CASES.values(), ids=CASES)
def test_reads_back_as_the_same_update(models: dict[str, Family], tmp_path: Path, base: str, wanted: str) -> None:
    model = models[base]
    layers = layers_of(model, wanted)
    read = model.read_lora(save_kohya(tmp_path / "kohya.safetensors", layers, model.component))
    assert layers and layers.keys() <= read.keys()
    for name, pair in read.items():
        if name in layers:
            assert (dense(pair) - dense(layers[name])).abs().max() < 1e-6, name
            assert pair.rank == 2 or read.keys() > layers.keys(), "fused layers that are complete come apart again"
        else:
            assert not pair.B.any(), f"{name} shares rows with an adapted layer and is none itself"


@pytest.mark.parametrize(("base", "stock", "wanted"), STOCK.values(), ids=STOCK)
def test_stock_diffusers_changes_the_output_as_the_dense_update_does(
    models: dict[str, Family], tmp_path: Path, base: str, stock: type, wanted: str
) -> None:
    model = models[base]
    inputs = (tiny.unet_inputs if base == "sdxl" else tiny.flux_inputs)(model.denoiser)
    layers = layers_of(model, wanted)
    with torch.no_grad():
        unchanged = model.denoiser(**inputs).sample
        with attached(model.denoiser, Plan.constant((layers,), (1.0,)), engine="merged"):  # W + B A
            meant = model.denoiser(**inputs).sample
        pipe = stock(**model.pipe.components)
        pipe.load_lora_weights(save_kohya(tmp_path / "kohya.safetensors", layers, model.component))
        seen = model.denoiser(**inputs).sample
        pipe.unload_lora_weights()
    assert (meant - unchanged).std() > 1e-2 * unchanged.std()
    torch.testing.assert_close(seen, meant, rtol=1e-5, atol=1e-5 * float(meant.abs().max()))


@pytest.mark.parametrize("adapted", [(0, 1, 2, 3), (0,), (1, 2), (-1,), (0, -1)], ids=str)
@pytest.mark.parametrize(("stem", "names"), FUSED.items(), ids=FUSED)
def test_a_fused_layer_is_its_parts_one_above_the_other(
    tmp_path: Path, stem: str, names: tuple[str, ...], adapted: tuple[int, ...]
) -> None:
    every = {name: square([name], rank=rank)[name] for rank, name in enumerate(names, start=1)}
    layers = {names[place]: every[names[place]] for place in adapted if place < len(names)}
    path = save_kohya(tmp_path / "kohya.safetensors", dict(reversed(layers.items())), "transformer")
    down, up, alpha = (
        load_file(path)[f"lora_unet_{stem}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    meant = [dense(pair) if name in layers else torch.zeros(pair.B.shape[0], 8) for name, pair in every.items()]
    torch.testing.assert_close(up @ down, torch.cat(meant), rtol=0, atol=1e-6)
    assert float(alpha) == len(down) == sum(pair.rank for pair in layers.values())
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == (str(len(down)) if len(layers) == 1 else "Dynamic")


NAMES = {
    **dict.fromkeys(IMAGE_QKV, "double_blocks_1_img_attn_qkv"),
    **dict.fromkeys(TEXT_QKV, "double_blocks_1_txt_attn_qkv"),
    **dict.fromkeys(QKV_MLP, "single_blocks_0_linear1"),
    "transformer_blocks.18.attn.to_out.0": "double_blocks_18_img_attn_proj",
    "transformer_blocks.18.attn.to_add_out": "double_blocks_18_txt_attn_proj",
    "transformer_blocks.18.ff.net.0.proj": "double_blocks_18_img_mlp_0",
    "transformer_blocks.18.ff.net.2": "double_blocks_18_img_mlp_2",
    "transformer_blocks.18.ff_context.net.0.proj": "double_blocks_18_txt_mlp_0",
    "transformer_blocks.18.ff_context.net.2": "double_blocks_18_txt_mlp_2",
    "transformer_blocks.18.norm1.linear": "double_blocks_18_img_mod_lin",
    "transformer_blocks.18.norm1_context.linear": "double_blocks_18_txt_mod_lin",
    "single_transformer_blocks.37.proj_out": "single_blocks_37_linear2",
    "single_transformer_blocks.37.norm.linear": "single_blocks_37_modulation_lin",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in_out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "proj_out": "final_layer_linear",
}
SDXL_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("component", "names"),
    [("transformer", NAMES), ("unet", {SDXL_Q: "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"})],
)
def test_keys_are_those_of_sd_scripts(tmp_path: Path, component: str, names: dict[str, str]) -> None:
    file = load_file(save_kohya(tmp_path / "kohya.safetensors", square(names), component))
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert file.keys() == {f"lora_unet_{name}.{part}" for name in names.values() for part in parts}
    for name in names.values():
        alpha = file[f"lora_unet_{name}.alpha"]
        assert alpha.is_floating_point() and float(alpha) == len(file[f"lora_unet_{name}.lora_down.weight"])


def test_the_last_modulation_has_its_halves_swapped(tmp_path: Path) -> None:
    pair = LowRank(torch.ones(1, 4), torch.arange(6.0)[:, None])
    file = load_file(save_kohya(tmp_path / "kohya.safetensors", {"norm_out.linear": pair}, "transformer"))
    assert file["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"].flatten().tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("component", "module", "base"),
    [("unet", "networks.lora", "sdxl_base_v1-0"), ("transformer", "networks.lora_flux", "flux1")],
)
def test_metadata_says_what_the_file_is(tmp_path: Path, component: str, module: str, base: str) -> None:
    given = {"trigger": "sbu", "ss_network_dim": "wrong"}
    path = save_kohya(tmp_path / "kohya.safetensors", square(QKV_MLP, rank=3), component, given, torch.float16)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "trigger": "sbu", "ss_network_module": module, "ss_base_model_version": base,
            "ss_network_dim": "3", "ss_network_alpha": "3",
        }  # fmt: skip
        assert {file.get_tensor(key).dtype for key in file.keys() if "lora_" in key.split(".")[1]} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_out", "single_transformer_blocks.0.attn.to_out.0", "x"])
def test_a_layer_without_a_name_there_is_refused(tmp_path: Path, name: str) -> None:
    refusal = f"{name!r} has no name in kohya's format. Expected a linear layer of FLUX.1."
    with pytest.raises(LoRAError, match=f"^{re.escape(refusal)}$"):
        save_kohya(tmp_path / "kohya.safetensors", square([*IMAGE_QKV, name]), "transformer")
    assert not list(tmp_path.iterdir())
