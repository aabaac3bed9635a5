"""SDXL as its authors publish it: one file, whose tensors have the names of their own code. Knows nothing of klora.

The names follow from how that code builds its models: a U-Net of numbered blocks, each a list of layers; a VAE whose
attention is made of convolutions; OpenAI's CLIP; OpenCLIP, whose query, key and value are one matrix.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from test_folder import tiny

# Of layers, by diffusers' name.
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_ATTENTION_OF_VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
IN_OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def build_single_file(folder: Path, name: str = "model.safetensors") -> tuple[Path, Path]:
    """A tiny random SDXL in fp16, written twice: folder/parts as diffusers does, folder/single as its authors do, with
    the small files of the first. The text encoders differ in width, by which they are told apart."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.build_sdxl(folder / "whole"), dtype=torch.float16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        widths = {"text_encoder": 24, "text_encoder_2": 40}  # 64 together, as the U-Net expects
        for part, width in widths.items():
            config = transformers.CLIPTextConfig.from_pretrained(folder / "whole" / part)
            config.hidden_size, config.intermediate_size = width, 2 * width
            pipe.register_modules(**{part: type(getattr(pipe, part))(config).half()})
        for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            for parameter in part.parameters():  # new ones are all 0 or all 1 where they are norms and biases
                parameter.data += 0.02 * torch.randn(parameter.shape).half()
    pipe.save_pretrained(folder / "parts")
    single = folder / "single"
    for path in (folder / "parts").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            target = single / path.relative_to(folder / "parts")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    save_file(original(pipe), single / name)
    return folder / "parts", single


def original(pipe: diffusers.StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """The weights of an SDXL by the names of its authors' code."""
    parts = {
        "model.diffusion_model.": unet(pipe.unet.state_dict(), pipe.unet.config.layers_per_block),
        "first_stage_model.": vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels)),
        "conditioner.embedders.0.transformer.text_model.": bare(pipe.text_encoder.state_dict()),
        "conditioner.embedders.1.model.": openclip(bare(pipe.text_encoder_2.state_dict())),
    }
    return {prefix + name: tensor.contiguous() for prefix, part in parts.items() for name, tensor in part.items()}


def bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that transformers gives the tensors of some text encoders."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def unet(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """depth: resnets in a block on the way down; there is one more on the way up."""
    return {_of_unet(name, depth, tensors): tensor for name, tensor in tensors.items()}


def _of_unet(name: str, depth: int, tensors: Mapping[str, Tensor]) -> str:
    layer, kind = name.rsplit(".", 1)
    if layer in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[layer]}.{kind}"
    if layer.startswith("mid_block"):
        _, part, index, inside = layer.split(".", 3)
        place = f"middle_block.{2 * int(index) if part == 'resnets' else 1}"
        return f"{place}.{IN_RESNET.get(inside, inside)}.{kind}"
    way, block, part, index, inside = layer.split(".", 4)
    first = int(block) * (depth + 1)
    if part == "downsamplers":  # after the block, with a number of its own
        return f"input_blocks.{first + depth + 1}.0.op.{kind}"
    if part == "upsamplers":  # in the block's last number, behind its attention if there is one
        behind = any(other.startswith(f"up_blocks.{block}.attentions") for other in tensors)
        return f"output_blocks.{first + depth}.{2 if behind else 1}.conv.{kind}"
    number = first + int(index)
    place = f"input_blocks.{number + 1}" if way == "down_blocks" else f"output_blocks.{number}"
    if part == "resnets":
        return f"{place}.0.{IN_RESNET[inside]}.{kind}"
    return f"{place}.1.{inside}.{kind}"


def vae(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """levels: of resolution, which the decoder numbers from the image on."""
    found = {}
    for name, tensor in tensors.items():
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if attention := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            place, inside, kind = attention.groups()
            name = f"{place}mid.attn_1.{IN_ATTENTION_OF_VAE[inside]}.{kind}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # a convolution of one pixel
        found[name] = tensor
    return found


def openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of CLIP's text tower with a projection."""
    found = {
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["final_layer_norm.weight"],
        "ln_final.bias": tensors["final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),  # which nothing here reads
    }
    for name, tensor in tensors.items():
        if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            number, inside, kind = layer.groups()
            place = f"transformer.resblocks.{number}"
            if inside in IN_OPENCLIP:
                found[f"{place}.{IN_OPENCLIP[inside]}.{kind}"] = tensor
            elif inside == "self_attn.q_proj":
                three = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[f"{place}.attn.in_proj_{kind}"] = torch.cat(three)
    return found
