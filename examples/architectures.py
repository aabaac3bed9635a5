"""The toy bases' parts: the published architectures, tiny."""

import re
from typing import Any

import diffusers
import torch
import transformers

from examples.drawing import COLOURS, GROUNDS, PHRASES, PLACES, SHAPES, SIDE, SIZES, STYLES, TEMPLATES, THINGS
from examples.figures import SUBJECTS
from examples.tokenizers import clip_tokenizer, t5_tokenizer

LATENT_CHANNELS = {"sdxl": 4, "flux-dev": 16}  # as published; diffusers' SDXL inpainting takes no others
CELL = {"sdxl": 4, "flux-dev": 8}  # side in pixels; so few channels cannot show shapes in larger ones
SIDES = {"sdxl": SIDE // 2, "flux-dev": SIDE}  # of a picture in pixels: so both have 256 cells
TOKENS = 32  # of a prompt
_SPOKEN = [
    *COLOURS,
    *GROUNDS,
    *SHAPES,
    *SIZES,
    *PLACES,
    *TEMPLATES,
    *STYLES,
    *SUBJECTS,
    *THINGS,
    *(p for own in PHRASES.values() for p in own),
]
WORDS = " ".join(
    dict.fromkeys(" ".join(_SPOKEN).replace("{things}", "").replace("{ground}", "").replace(",", " ,").split())
)
WORDS += " an and a made of with photo painting style two three"


def toy_vae(base: str) -> diffusers.AutoencoderKL:
    """Each base's own, as the published ones differ. 0.65 and 0.97 million parameters."""
    widths = {4: (16, 32, 64), 8: (16, 32, 64, 64)}[CELL[base]]
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=LATENT_CHANNELS[base],
        sample_size=SIDES[base],
        mid_block_add_attention=False,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def toy_sdxl(autoencoder: diffusers.AutoencoderKL) -> diffusers.StableDiffusionXLPipeline:
    """SDXL: text_time conditioning, two CLIP encoders, cross-attention at every resolution."""
    first, second = (clip_tokenizer(WORDS, pad, TOKENS) for pad in ("<|endoftext|>", "!"))
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDES["sdxl"] // CELL["sdxl"],
        in_channels=LATENT_CHANNELS["sdxl"],
        out_channels=LATENT_CHANNELS["sdxl"],
        block_out_channels=(32, 96, 160),
        # The published U-Net has no attention among its finest cells. Here LoRAs of attention need it there: these
        # cells are a sixteenth of the picture wide, as that one's next finer are.
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[1, 2, 4],
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=2 * 96,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=96 + 6 * 16,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=transformers.CLIPTextModel(_clip(first, 96, "quick_gelu")),
        text_encoder_2=transformers.CLIPTextModelWithProjection(_clip(second, 96, "gelu")),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",  # weighs what much noise hides, as grounds, and so learns it sooner
            timestep_spacing="trailing",
            # The first step begins in noise alone, where nothing but the prompt tells a shape (arXiv:2305.08891).
            rescale_betas_zero_snr=True,
        ),
    )


def toy_flux(autoencoder: diffusers.AutoencoderKL) -> diffusers.FluxPipeline:
    """FLUX.1-dev: guidance embedding, CLIP and T5, double and single blocks."""
    first, second = clip_tokenizer(WORDS, "<|endoftext|>", TOKENS), t5_tokenizer(WORDS, TOKENS)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS["flux-dev"],
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=96,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )
    for name, module in transformer.named_modules():
        if re.search(r"norm(1|1_context|_out)?\.linear$|^proj_out$", name):
            torch.nn.init.zeros_(module.weight)  # blocks begin as the identity (adaLN-Zero, arXiv:2212.09748)
            torch.nn.init.zeros_(module.bias)
    t5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "vocab_size": len(second)}
    return diffusers.FluxPipeline(
        vae=autoencoder,
        text_encoder=transformers.CLIPTextModel(_clip(first, 96, "quick_gelu")),
        tokenizer=first,
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **t5)),
        tokenizer_2=second,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _clip(tokenizer: Any, width: int, activation: str) -> transformers.CLIPTextConfig:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=width,
        hidden_act=activation,
        vocab_size=len(tokenizer),
        **{name: getattr(tokenizer, name) for name in names},
    )
