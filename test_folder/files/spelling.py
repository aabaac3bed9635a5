"""How LoRA files spell the layers of a denoiser: endings, prefixes, Stability's and BFL's own names."""

import re
from collections.abc import Mapping

from torch import Tensor

from klora.models.family import Family
from test_folder import tiny

Layers = Mapping[str, tuple[Tensor, Tensor]]
Endings = tuple[str, str]  # of the keys of A and of B

PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
LEGACY = (".lora.down.weight", ".lora.up.weight")
XLABS = (".down.weight", ".up.weight")
SPELLINGS = {
    "diffusers": ("{component}.{name}", PEFT),
    "adapter": ("{component}.{name}", (".lora_A.default.weight", ".lora_B.default.weight")),
    "legacy": ("{component}.{name}", LEGACY),
    "linear_layer": ("{component}.{name}", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "double": ("{component}.{component}.{name}", LEGACY),
    "processor": ("{component}.{processor}", ("_lora.down.weight", "_lora.up.weight")),
    "cog_sdxl": ("{processor}", ("_lora.down.weight", "_lora.up.weight")),
    "bare": ("{name}", PEFT),
    "raw_peft": ("base_model.model.{name}", PEFT),
    "raw_peft_of_a_pipeline": ("{component}.base_model.model.{name}", PEFT),
    "comfy": ("diffusion_model.{name}", PEFT),
    "civitai": ("{component}.{name}", KOHYA),
    "kohya": ("lora_{component}_{flat}", KOHYA),
    "kohya_unet": ("lora_unet_{flat}", KOHYA),
    "lycoris": ("lycoris_{flat}", KOHYA),
}

# BFL's name of a FLUX module: the diffusers modules that share its rows. The blocks' numbers are the same.
BFL = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"],
    "double_blocks.{}.img_attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks.{}.img_mod.lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.{}.txt_attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks.{}.txt_mod.lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.proj_out"],
    "single_blocks.{}.modulation.lin": ["single_transformer_blocks.{}.norm.linear"],
}
BFL_EDGES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def keyed(stem: str, factors: tuple[Tensor, Tensor], endings: Endings = PEFT) -> dict[str, Tensor]:
    return {stem + ending: factor for ending, factor in zip(endings, factors, strict=True)}


def spelled(layers: Layers, component: str, spelling: str) -> dict[str, Tensor]:
    template, endings = SPELLINGS[spelling]
    tensors = {}
    for name, factors in layers.items():
        processor = re.sub(r"\.(to_\w+?)(\.0)?$", r".processor.\1", name)
        stem = template.format(component=component, name=name, flat=name.replace(".", "_"), processor=processor)
        tensors |= keyed(stem, factors, endings)
    return tensors


def attention(model: Family) -> dict[str, tuple[int, int]]:
    shapes = tiny.linear_shapes(model.denoiser)
    return {name: shape for name, shape in shapes.items() if re.search(r"\.to_(q|k|v|out\.0)$", name)}


def sgm(name: str) -> str:
    """Stability's own name of a linear in a U-Net of one layer a block: input 1 + 2 i + j, output 2 i + j."""
    name = re.sub(r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}", name)
    name = re.sub(r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}", name)
    name = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", name)
    name = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    for side, ours, first in (("down", "input", 1), ("up", "output", 0)):
        for index, kind in enumerate(("resnets", "attentions")):
            block = re.match(rf"{side}_blocks\.(\d)\.{kind}\.(\d)(.*)", name)
            if block:
                name = f"{ours}_blocks.{first + 2 * int(block[1]) + int(block[2])}.{index}{block[3]}"
    return name.replace("time_emb_proj", "emb_layers.1")


def bfl_modules(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """{BFL's name: the diffusers modules that share its rows} for the two blocks of a kind that the tiny FLUX has."""
    blocks = {bfl.format(i): [part.format(i) for part in parts] for i in (0, 1) for bfl, parts in BFL.items()}
    modules = blocks | {bfl: [name] for bfl, name in BFL_EDGES.items()}
    assert all(name in shapes for names in modules.values() for name in names)
    return modules
