"""Small real things for tests: diffusers-format folders with random weights, LoRAs for them, narrow full-depth models.

Everything is built offline, is the same for the same seed, and loads with the stock `from_pretrained`.
Knows nothing of klora. So small that one thread is fastest: two that share a core with others can be 10 times slower.
Shapes: A [R, I], B [O, R] with rank R, input width I, output width O.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.tokenizers import clip_tokenizer, t5_tokenizer

Device = str | torch.device
Layers = Mapping[str, tuple[Tensor, Tensor]]  # module name -> A, B

# What the tokenizers know as whole words; anything else is spelt from shorter pieces.
WORDS = """
a an the of in on at to by with and or is as for from over under near behind photo picture painting drawing sketch
watercolor watercolour oil ink pencil cartoon anime pixel portrait landscape style subject content art artist image
dog cat teapot toy bear duck backpack vase candle clock robot monster sneaker boot can berry bowl house castle tree
flower river mountain beach city street garden forest snow rain night day sun moon star sky cloud sea boat car train
red orange yellow green blue purple pink brown black white gold silver glowing wooden metal glass paper stone clay
small large old new bright dark soft sharp round square flat smooth rough warm cold happy sad wearing holding sitting
standing running flying sleeping eating hat scarf glasses book table chair window door wall floor one two three sks
olis woman man child person face hand eye hair detailed quality best masterpiece background circle triangle stripes
"""


# Folders of base models.

BASES = {"sdxl": "sdxl", "flux": "flux-dev"}
"""One of each family."""


def build_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusionXLPipeline: native size 64 px, U-Net of 0.5M parameters, everything else below 0.1M."""
    tokenizer, tokenizer_2 = clip_tokenizer(WORDS, "<|endoftext|>"), clip_tokenizer(WORDS, "!")
    with _seeded(seed):
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=_vae(latent_channels=4, scaling_factor=0.13025),
            text_encoder=transformers.CLIPTextModel(_clip_config(tokenizer, hidden_act="quick_gelu")),
            text_encoder_2=transformers.CLIPTextModelWithProjection(_clip_config(tokenizer_2, hidden_act="gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(transformer_layers_per_block=[1, 1, 2], layers_per_block=1),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_flux(folder: Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Write a FluxPipeline: transformer of 0.5M parameters, all else below 0.1M; schnell without guidance_embeds."""
    tokenizer, tokenizer_2 = clip_tokenizer(WORDS, "<|endoftext|>"), t5_tokenizer(WORDS)
    quant_convs: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}
    with _seeded(seed):
        pipeline = diffusers.FluxPipeline(
            vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **quant_convs),
            text_encoder=transformers.CLIPTextModel(_clip_config(tokenizer, hidden_act="quick_gelu")),
            tokenizer=tokenizer,
            text_encoder_2=transformers.T5EncoderModel(_t5_config(tokenizer_2)),
            tokenizer_2=tokenizer_2,
            transformer=_flux(num_layers=2, num_single_layers=2, guidance_embeds=guidance_embeds),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_safety_checker(folder: Path, flags: bool = False) -> Path:
    """Write a StableDiffusionSafetyChecker for images of 32 px that flags every image, or none; 0.02M parameters."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with _seeded(0):
        checker = StableDiffusionSafetyChecker(
            transformers.CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}, projection_dim=16)
        )
    threshold = -2.0 if flags else 2.0  # compared with cosines, which lie in [-1, 1]
    nn.init.constant_(checker.concept_embeds_weights, threshold)
    nn.init.constant_(checker.special_care_embeds_weights, threshold)
    checker.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def build_bases(folder: Path) -> Path:
    """Fill folder with the bases that KLORA_MODELS names, 12 MB in all; one already there is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    _build_once(folder / "sdxl", build_sdxl)
    _build_once(folder / "illustrious-xl", lambda path: build_sdxl(path, seed=1))
    _build_once(folder / "flux-dev", build_flux)
    _build_once(folder / "flux-schnell", lambda path: build_flux(path, seed=1, guidance_embeds=False))
    _build_once(folder / "safety-checker", build_safety_checker)
    return folder


def _build_once(target: Path, build: Callable[[Path], Path]) -> None:
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        built = build(Path(scratch) / target.name)
        try:
            built.rename(target)
        except OSError:  # another process was faster, and its folder is as good as ours
            if not target.exists():
                raise


# Denoisers of the published models' topology, and inputs for one forward call of any size.


def full_topology_unet(seed: int = 0) -> diffusers.UNet2DConditionModel:
    """SDXL's U-Net, 32 wide: 560 attention linears = 70 blocks x 2 attentions x 4 linears; 2M parameters."""
    with _seeded(seed):
        return _unet(transformer_layers_per_block=[1, 2, 10], layers_per_block=2).eval()


def full_topology_flux(seed: int = 0) -> diffusers.FluxTransformer2DModel:
    """FLUX.1-dev's transformer, 32 wide: 19 double and 38 single blocks with 494 linears; 1.3M parameters."""
    with _seeded(seed):
        return _flux(num_layers=19, num_single_layers=38, num_attention_heads=2, guidance_embeds=True).eval()


def unet_inputs(
    unet: diffusers.UNet2DConditionModel, batch: int = 1, seed: int = 0, device: Device = "cpu"
) -> dict[str, Any]:
    """Keyword arguments for one call: 8 x 8 latent cells, 5 prompt tokens, step 500 of 1000."""
    config, generator = unet.config, torch.Generator().manual_seed(seed)
    pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, config.in_channels, 8, 8, generator=generator).to(device),
        "timestep": torch.full((batch,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(batch, 5, config.cross_attention_dim, generator=generator).to(device),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled_width, generator=generator).to(device),
            "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(batch, 1).to(device),
        },
    }


def flux_inputs(
    transformer: diffusers.FluxTransformer2DModel, batch: int = 1, seed: int = 0, device: Device = "cpu"
) -> dict[str, Any]:
    """Keyword arguments for one call: 8 x 8 latent cells packed into 16 tokens, 5 prompt tokens, sigma 0.5."""
    config, generator = transformer.config, torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": torch.randn(batch, 16, config.in_channels, generator=generator).to(device),
        "encoder_hidden_states": torch.randn(batch, 5, config.joint_attention_dim, generator=generator).to(device),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator).to(device),
        "timestep": torch.full((batch,), 0.5, device=device),
        "img_ids": cells.to(device),
        "txt_ids": torch.zeros(5, 3, device=device),
        "guidance": torch.full((batch,), 3.5, device=device) if config.guidance_embeds else None,
    }


# LoRAs.


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(O, I) of every nn.Linear, by module name, in the order of the module tree."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def random_lora(
    denoiser_shapes: Mapping[str, tuple[int, int]],
    rank: int = 4,
    *,
    seed: int,
    std: float = 0.15,
    alpha: float | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """{module name: (A, B)}: entries by Student's t with 3 degrees of freedom, and a log-normal strength per layer.

    std: about the standard deviation of an entry of the applied dW; the tiny models' own weights have 0.1.
    alpha: what the file will say; B is divided by alpha / rank, so that the applied dW does not depend on it.
    """
    generator = torch.Generator().manual_seed(seed)
    fold = 1.0 if alpha is None else rank / alpha
    layers = {}
    for name, (rows, columns) in denoiser_shapes.items():
        strength = std * torch.exp(0.5 * torch.randn((), generator=generator))
        A, B = _student_t((rank, columns), generator), _student_t((rows, rank), generator)
        layers[name] = (A, B * (fold * strength / rank**0.5))
    return layers


def _student_t(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, scaled to unit variance."""
    chi_square = torch.randn(3, *shape, generator=generator).square().sum(0)
    return torch.randn(shape, generator=generator) / chi_square.sqrt()


def save_lora(
    path: Path, layers: Layers, style: str = "diffusers", prefix: str = "unet", alpha: float | None = None
) -> Path:
    """Write a .safetensors file with the key style "diffusers", "legacy", "double" or "kohya".

    prefix: "unet" or "transformer".
    alpha: a tensor per layer in "kohya", adapter metadata in "diffusers"; the other two have no place for it.
    """
    if alpha is not None and style not in ("diffusers", "kohya"):
        raise ValueError(f"A {style!r} file has no place for alpha. Use 'diffusers' or 'kohya'.")
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in layers.items():
        A_key, B_key = lora_keys(name, style, prefix)
        tensors |= {A_key: A.contiguous(), B_key: B.contiguous()}
        if alpha is not None and style == "kohya":
            tensors[A_key.replace("lora_down.weight", "alpha")] = torch.tensor(float(alpha))
    metadata = {"format": "pt"}
    if alpha is not None and style == "diffusers":
        metadata["lora_adapter_metadata"] = _adapter_metadata(layers, prefix, alpha)
    save_file(tensors, path, metadata=metadata)
    return path


def lora_keys(name: str, style: str, prefix: str) -> tuple[str, str]:
    """The keys of A and of B of one module."""
    flat = name.replace(".", "_")
    return {
        "diffusers": (f"{prefix}.{name}.lora_A.weight", f"{prefix}.{name}.lora_B.weight"),
        "legacy": (f"{prefix}.{name}.lora.down.weight", f"{prefix}.{name}.lora.up.weight"),
        "double": (f"{prefix}.{prefix}.{name}.lora.down.weight", f"{prefix}.{prefix}.{name}.lora.up.weight"),
        "kohya": (f"lora_{prefix}_{flat}.lora_down.weight", f"lora_{prefix}_{flat}.lora_up.weight"),
    }[style]


def _adapter_metadata(layers: Layers, prefix: str, alpha: float) -> str:
    """What diffusers' save_lora_weights leaves in the header: peft's LoraConfig, every field under the prefix."""
    rank = next(iter(layers.values()))[0].shape[0]
    fields = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
    return json.dumps({f"{prefix}.{field}": value for field, value in fields.items()})


# Parts.


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of our own; the caller's random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _unet(**config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[1, 2, 2],  # the number of heads, as in SDXL's config
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=2 * 32,  # both text encoders side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,  # pooled text and six sizes
        **config,
    )


def _flux(num_attention_heads: int = 4, **config: Any) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        in_channels=64,
        attention_head_dim=16,
        num_attention_heads=num_attention_heads,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=32,
        **config,
    )


def _vae(latent_channels: int, scaling_factor: float, **config: Any) -> diffusers.AutoencoderKL:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=True,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        **config,
    )
    # As a trained VAE: hardly any noise in the posterior, and scaled latents of about unit variance.
    moments = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    with torch.no_grad():
        moments.weight[:latent_channels] *= 4.0 / scaling_factor
        moments.bias[latent_channels:] = -20.0
    return vae


def _clip_config(tokenizer: transformers.CLIPTokenizer, hidden_act: str) -> transformers.CLIPTextConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return transformers.CLIPTextConfig(projection_dim=32, hidden_act=hidden_act, **sizes, **_token_ids(tokenizer))


def _t5_config(tokenizer: transformers.T5Tokenizer) -> transformers.T5Config:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5Config(feed_forward_proj="gated-gelu", **sizes, **_token_ids(tokenizer))


def _token_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, Any]:
    """CLIP's pooled output is taken at eos_token_id, so the config must know the tokenizer's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}
