"""SDXL: Stable Diffusion XL and its fine-tunes, on diffusers' own pipelines. Knows nothing of fusion."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from klora.lora import Inventory, LoRA, read_lora
from klora.models import Conditioning, SampleConfig, denoise, inventory


class SDXL:
    """The SDXL family. Its VAE stays in float32: it overflows in half precision."""

    name: ClassVar[str] = "SDXL"
    component: ClassVar[str] = "unet"
    size_multiple: ClassVar[int] = 8
    negative_prompts: ClassVar[bool] = True
    steps: ClassVar[int] = 30
    guidance_scale: ClassVar[float] = 7.5
    schedulers: ClassVar[Mapping[str, Any]] = {
        "DDIM": (diffusers.DDIMScheduler, {}),
        "DPMSolverMultistep": (diffusers.DPMSolverMultistepScheduler, {}),
        "HeunDiscrete": (diffusers.HeunDiscreteScheduler, {}),
        "KarrasDPM": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        "K_EULER_ANCESTRAL": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "K_EULER": (diffusers.EulerDiscreteScheduler, {}),
        "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),  # its warm-up steps break image-to-image
    }

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        self.pipe = pipe

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> "SDXL":
        variant = "fp16" if any((path / "unet").glob("*.fp16.safetensors")) else None
        pipe = StableDiffusionXLPipeline.from_pretrained(
            path,
            dtype={"vae": torch.float32, "default": dtype},
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
        )
        return cls(pipe.to(device))

    @staticmethod
    def recognises(keys: list[str]) -> bool:
        return any(re.search(r"(down|up|input|output)_blocks|mid(dle)?_block", key) for key in keys)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @property
    def native_size(self) -> int:
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def text_encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.pipe.text_encoder, "text_encoder_2": self.pipe.text_encoder_2}

    def read_lora(self, path: Path) -> LoRA:
        def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=self.pipe.unet.config)[0]

        return read_lora(path, self._inventory, rename)

    def encode_prompt(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, self.pipe.encode_prompt(prompts, negative_prompt=negative_prompts), strict=True))

    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor

    def loss(self, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted noise (or velocity), timesteps uniform.

        conditioning may hold "time_ids" [N, 6]: original height and width, crop top and left, target height and width,
        in pixels; without it the latents' own size, uncropped.
        """
        unet, ddpm = self.pipe.unet, self._ddpm
        latents = latents.to(unet.device, torch.float32)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(ddpm.config.num_train_timesteps, latents.shape[:1], generator=generator)
        timesteps = timesteps.to(latents.device)
        predicted = unet(
            ddpm.add_noise(latents, noise, timesteps).to(unet.dtype),
            timesteps,
            conditioning["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"],
                "time_ids": conditioning.get("time_ids", self._time_ids(latents)),
            },
        ).sample
        v_prediction = ddpm.config.prediction_type == "v_prediction"
        target = ddpm.get_velocity(latents, noise, timesteps) if v_prediction else noise
        return (predicted.float() - target).square().mean(dim=(1, 2, 3))

    def sample(
        self, conditioning: Conditioning, config: SampleConfig, on_step: Callable[[int], None]
    ) -> list[Image.Image]:
        vae, parts = self.pipe.vae, self.pipe.components | {"scheduler": self._scheduler(config.scheduler)}
        pipeline, options = StableDiffusionXLPipeline, dict[str, Any](width=config.width, height=config.height)
        if config.image is not None:
            pixels = self.pipe.image_processor.preprocess(config.image, config.height, config.width)
            image = {"image": self.encode_images(pixels), "strength": config.strength}
            if config.mask is None:  # this pipeline takes its size from the image
                pipeline, options = StableDiffusionXLImg2ImgPipeline, image
            else:
                pipeline, options = StableDiffusionXLInpaintPipeline, options | image | {"mask_image": config.mask}
        latents = denoise(pipeline(**parts, add_watermarker=False), conditioning, config, on_step, **options)
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return self.pipe.image_processor.postprocess(pixels)

    def _scheduler(self, name: str | None) -> Any:
        """A scheduler of this request's own: one that keeps state between steps must not outlive it."""
        kind, options = self.schedulers[name or "K_EULER"]
        return kind.from_config(self.pipe.scheduler.config, **options)

    @cached_property
    def _inventory(self) -> Inventory:
        config = self.pipe.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        with torch.device("meta"):
            added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
            inputs = {
                "sample": torch.zeros(1, config.in_channels, 8, 8),
                "timestep": torch.zeros(1),
                "encoder_hidden_states": torch.zeros(1, 1, config.cross_attention_dim),
                "added_cond_kwargs": added,
            }
        return inventory(self.pipe, self.component, inputs)

    @cached_property
    def _ddpm(self) -> diffusers.DDPMScheduler:
        return diffusers.DDPMScheduler.from_config(self.pipe.scheduler.config)

    def _time_ids(self, latents: Tensor) -> Tensor:
        height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
        return latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)
