"""FLUX.1: dev and schnell, on diffusers' own pipelines. Knows nothing of fusion."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch import Tensor, nn

from klora.lora import Inventory, LoRA, read_lora
from klora.models.family import Conditioning, Posterior, denoise, inventory
from klora.request import Request


class Flux:
    """The FLUX.1 family: dev has a guidance embedding; schnell has none and needs few steps."""

    name: ClassVar[str] = "FLUX.1"
    component: ClassVar[str] = "transformer"
    size_multiple: ClassVar[int] = 16
    negative_prompts: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-4
    lora_rank: ClassVar[int] = 16
    schedulers: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, pipe: FluxPipeline) -> None:
        self.pipe = pipe
        self.denoiser: nn.Module = pipe.transformer
        self.text_encoders = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        self.native_size: int = pipe.vae.config.sample_size
        self._guided: bool = pipe.transformer.config.guidance_embeds
        self.steps, self.guidance_scale = (28, 3.5) if self._guided else (4, 0.0)

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> "Flux":
        pipe = FluxPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, local_files_only=True)
        pipe.vae.enable_slicing()  # one image at a time: less memory, and a batch decodes as its images alone would
        return cls(pipe.to(device))

    @staticmethod
    def recognises(keys: list[str]) -> bool:
        own = r"(single|double)_blocks|single_transformer_blocks|transformer_blocks[._]\d+[._](attn[._]|norm1_|ff_con)"
        return any(re.search(own, key) for key in keys)

    def read_lora(self, path: Path) -> LoRA:
        def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return FluxPipeline.lora_state_dict(tensors)

        return read_lora(path, self._inventory, rename)

    def encode_prompt(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        """negative_prompts have no effect: a guidance-distilled model steers away from nothing."""
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, max_sequence_length=512 if self._guided else 256)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_images(self, pixels: Tensor) -> Posterior:
        vae = self.pipe.vae
        posterior, scale = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist, vae.config.scaling_factor
        return Posterior((posterior.mean - vae.config.shift_factor) * scale, posterior.std * scale)

    def loss(self, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted velocity, noise - latents; logit-normal sigmas, guidance embedding 1."""
        transformer, embeds = self.pipe.transformer, conditioning["prompt_embeds"]
        latents = latents.to(transformer.device, torch.float32)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigmas = torch.randn(len(latents), generator=generator).sigmoid().to(latents)
        mixed = torch.lerp(latents, noise, sigmas[:, None, None, None])
        height, width = (side // 2 for side in latents.shape[-2:])
        predicted = transformer(
            hidden_states=_packed(mixed).to(transformer.dtype),
            timestep=sigmas,
            guidance=torch.ones_like(sigmas) if self._guided else None,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            img_ids=FluxPipeline._prepare_latent_image_ids(1, height, width, embeds.device, embeds.dtype),
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
        ).sample
        return (predicted.float() - _packed(noise - latents)).square().mean(dim=(1, 2))

    def sample(self, conditioning: Conditioning, request: Request, on_step: Callable[[int], None]) -> list[Image.Image]:
        vae, processor, scheduler = self.pipe.vae, self.pipe.image_processor, self.pipe.scheduler
        scheduler = type(scheduler).from_config(scheduler.config)  # of the request's own: it keeps state between steps
        width, height = request.size(self.native_size, self.size_multiple)
        pipeline, options = FluxPipeline, dict[str, Any](width=width, height=height)
        if request.image is not None:
            latents = self.encode_images(processor.preprocess(request.image, height, width)).mean
            pipeline, options = FluxImg2ImgPipeline, options | {"image": latents, "strength": request.prompt_strength}
        if request.mask is not None:
            pipeline = FluxInpaintPipeline
            options |= {"mask_image": request.mask, "masked_image_latents": options["image"]}
        pipe = pipeline(**self.pipe.components | {"scheduler": scheduler})
        packed = denoise(pipe, self, conditioning, request, on_step, **options)
        latents = FluxPipeline._unpack_latents(packed, height, width, self.pipe.vae_scale_factor)
        return processor.postprocess(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample)

    @cached_property
    def _inventory(self) -> Inventory:
        config = self.pipe.transformer.config
        with torch.device("meta"):
            inputs = {
                "hidden_states": torch.zeros(1, 1, config.in_channels),
                "encoder_hidden_states": torch.zeros(1, 1, config.joint_attention_dim),
                "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
                "timestep": torch.zeros(1),
                "guidance": torch.zeros(1) if self._guided else None,
                "img_ids": torch.zeros(1, 3),
                "txt_ids": torch.zeros(1, 3),
            }
        return inventory(self, inputs)


def _packed(latents: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H/2 * W/2, 4 C], 2x2 cells to a token."""
    return FluxPipeline._pack_latents(latents, *latents.shape)
