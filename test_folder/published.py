"""The published models' sizes, for what is counted or timed without their weights. Knows nothing of klora."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import nn


def unet(depths: tuple[int, int] = (2, 10)) -> diffusers.UNet2DConditionModel:
    """stabilityai/stable-diffusion-xl-base-1.0: 2.567 billion parameters, 560 attention linears. depths: transformer
    blocks in each attention of the second and of the third level."""
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, *depths],
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux(depths: tuple[int, int] = (19, 38)) -> diffusers.FluxTransformer2DModel:
    """black-forest-labs/FLUX.1-dev: 11.90 billion parameters, 494 linears in its blocks. depths: double and single
    blocks."""
    return diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=depths[0],
        num_single_layers=depths[1],
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def vae(latent_channels: int, **config: Any) -> diffusers.AutoencoderKL:
    """SDXL's with 4 latent channels, FLUX.1's with 16: 84 million parameters."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=1024,
        latent_channels=latent_channels,
        **config,
    )


def clip_l() -> transformers.CLIPTextModel:
    """OpenAI's ViT-L/14 text tower: 123 million parameters."""
    return transformers.CLIPTextModel(_clip(768, 12, 12, "quick_gelu"))


def clip_g() -> transformers.CLIPTextModelWithProjection:
    """OpenCLIP's ViT-bigG/14 text tower: 695 million parameters."""
    return transformers.CLIPTextModelWithProjection(_clip(1280, 32, 20, "gelu"))


def t5_xxl() -> transformers.T5EncoderModel:
    """T5 1.1 XXL's encoder: 4.76 billion parameters."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", vocab_size=32128, **sizes))


def modules(component: str) -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """{pipeline component: (its part in klora.models.family, what builds it)} of SDXL ("unet") or FLUX.1
    ("transformer")."""
    if component == "unet":
        vae_of, second, denoiser = partial(vae, 4, scaling_factor=0.13025), clip_g, unet
    else:
        shift = {
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
        vae_of, second, denoiser = partial(vae, 16, **shift), t5_xxl, flux
    encoders = {"text_encoder": ("text", clip_l), "text_encoder_2": ("text", second)}
    return encoders | {"vae": ("vae", vae_of), component: ("denoiser", denoiser)}


def random(build: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The module, frozen, in this dtype from the beginning: float32 on the way would count as its memory."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return build().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def _clip(width: int, layers: int, heads: int, activation: str) -> transformers.CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return transformers.CLIPTextConfig(
        **sizes, num_attention_heads=heads, projection_dim=width, hidden_act=activation, vocab_size=49408
    )
