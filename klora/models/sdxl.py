"""SDXL: Stable Diffusion XL and its fine-tunes, on diffusers' own pipelines. Knows nothing of fusion."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from klora.errors import BaseModelError
from klora.files import read_lora
from klora.files.names import Inventory
from klora.form.pictures import cellwise, framed, overlaid
from klora.form.request import Request
from klora.lora import LoRA
from klora.models.family import (
    EVERY_PART,
    Compiled,
    Conditioning,
    Part,
    Posterior,
    Prediction,
    Quantized,
    Recipe,
    checkpoint_in,
    denoise,
    encoders,
    inventory_of,
    load_parts,
    quantization,
    word_widths,
)
from klora.models.prompts import pieces


class SDXL:
    """The SDXL family. Its VAE stays in float32: it overflows in half precision."""

    name: ClassVar[str] = "SDXL"
    component: ClassVar[str] = "unet"
    size_multiple: ClassVar[int] = 8
    negative_prompts: ClassVar[bool] = True
    host_bound: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe(5e-5, rank=8, times="uniform", resolutions=(1.0,))
    schedulers: ClassVar[Mapping[str, Any]] = {
        "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}),  # latents go beyond [-1, 1]
        "DPMSolverMultistep": (diffusers.DPMSolverMultistepScheduler, {}),
        "HeunDiscrete": (diffusers.HeunDiscreteScheduler, {}),
        "KarrasDPM": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        "K_EULER_ANCESTRAL": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "K_EULER": (diffusers.EulerDiscreteScheduler, {}),
        "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),  # its warm-up steps break image-to-image
    }

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        self.pipe = pipe
        self.compiled: Compiled | None = None
        self.denoiser: nn.Module = pipe.unet
        self.text_encoders = encoders(pipe)
        self.native_size: int = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.steps, self.guidance_scale = 30, 7.5

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        parts: Collection[Part] = EVERY_PART,
        quantized: Quantized | None = None,
    ) -> "SDXL":
        checkpoint = checkpoint_in(path)
        if checkpoint and quantized:
            raise BaseModelError(f"{checkpoint.name} is one file, which cannot be {quantized}. Expected bf16 or fp32.")
        options = quantization(cls.component, quantized, dtype)
        if any((path / "unet").glob("*.fp16.safetensors")):
            options["variant"] = "fp16"
        options |= {"dtype": {"vae": torch.float32, "default": dtype}, "add_watermarker": False}
        return cls(load_parts(StableDiffusionXLPipeline, path, device, parts, checkpoint, **options))

    @staticmethod
    def recognises(keys: list[str]) -> bool:
        return any(re.search(r"(down|up|input|output)_blocks|mid(dle)?_block", key) for key in keys)

    def read_lora(self, path: Path | str) -> LoRA:
        def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=self.pipe.unet.config)[0]

        return read_lora(path, self.inventory, rename, word_widths(self))

    def encode_prompt(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        """A prompt of more tokens than CLIP reads is read in pieces, which follow one another; the first is pooled.
        What has fewer pieces than the longest is followed by what the encoders make of nothing."""
        device, steered = self.pipe.text_encoder.device, negative_prompts is not None
        read = [pieces(self.pipe.tokenizer, text) for text in (*prompts, *(negative_prompts or ()))]
        encoded = []
        for turn in zip_longest(*read, fillvalue=""):
            wanted, unwanted = list(turn[: len(prompts)]), list(turn[len(prompts) :])
            encoded += [self.pipe.encode_prompt(wanted, device=device, negative_prompt=unwanted if steered else None)]
        embeds, negative_embeds, pooled, negative_pooled = zip(*encoded, strict=True)
        return {
            "prompt_embeds": torch.cat(embeds, dim=1),
            "negative_prompt_embeds": torch.cat(negative_embeds, dim=1),
            "pooled_prompt_embeds": pooled[0],
            "negative_pooled_prompt_embeds": negative_pooled[0],
        }

    def encode_images(self, pixels: Tensor) -> Posterior:
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return Posterior(posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor)

    def predict(self, latents: Tensor, noise: Tensor, times: Tensor, conditioning: Conditioning) -> Prediction:
        """The noise, or the velocity where the base's scheduler says v_prediction.

        conditioning may hold "time_ids" [N, 6]: original height and width, crop top and left, target height and width,
        in pixels; without it the latents' own size, uncropped.
        """
        unet, ddpm = self.pipe.unet, self._ddpm
        levels = ddpm.config.num_train_timesteps
        timesteps = (times * levels).long().clamp(max=levels - 1)
        predicted = unet(
            ddpm.add_noise(latents, noise, timesteps).to(unet.dtype),
            timesteps,
            conditioning["prompt_embeds"].to(unet.dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"].to(unet.dtype),
                "time_ids": conditioning["time_ids"] if "time_ids" in conditioning else self._time_ids(latents),
            },
        ).sample
        kept = ddpm.alphas_cumprod.to(latents.device)[timesteps]
        snr = kept / (1 - kept)
        if ddpm.config.prediction_type == "v_prediction":
            return Prediction(predicted.float(), ddpm.get_velocity(latents, noise, timesteps), snr, snr + 1)
        return Prediction(predicted.float(), noise, snr, snr)

    def sample(
        self, conditioning: Conditioning, request: Request, on_step: Callable[[int], Any], seeds: Sequence[int] = ()
    ) -> list[Image.Image]:
        vae, processor = self.pipe.vae, self.pipe.image_processor
        # A scheduler of the request's own: one that keeps state between steps must not outlive it.
        scheduler, options = self.schedulers[request.scheduler or "K_EULER"]
        scheduler = scheduler.from_config(self.pipe.scheduler.config, **options)
        width, height = request.size(self.native_size, self.size_multiple)
        pipeline, options = StableDiffusionXLPipeline, {"width": width, "height": height}
        given = framed(request.image, request.mask, (width, height))
        # Without a mask strength 1 starts from noise alone, of which SDXL's last beta would leave a trace of the image.
        if "image" in given and ("mask" in given or request.prompt_strength < 1):
            latents = self.encode_images(processor.preprocess(given["image"])).mean
            image = {"image": latents, "strength": request.prompt_strength}
            if "mask" in given:
                image["mask_image"] = cellwise(given["mask"], self.pipe.vae_scale_factor)
                pipeline, options = StableDiffusionXLInpaintPipeline, options | image
            else:  # this pipeline takes its size from the image
                pipeline, options = StableDiffusionXLImg2ImgPipeline, image
        pipe = pipeline(**self.pipe.components | {"scheduler": scheduler}, add_watermarker=False)
        latents = denoise(pipe, self, conditioning, request, on_step, seeds, **options)
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return overlaid(processor.postprocess(decoded), given)

    @cached_property
    def inventory(self) -> Inventory:
        return inventory_of(self, _smallest_call)

    @cached_property
    def _ddpm(self) -> diffusers.DDPMScheduler:
        return diffusers.DDPMScheduler.from_config(self.pipe.scheduler.config)

    def _time_ids(self, latents: Tensor) -> Tensor:
        height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
        return latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)


def _smallest_call(unet: Any) -> dict[str, Any]:
    """Keyword arguments for 8 x 8 latents, which can be halved as often as a U-Net does, and a token of a prompt."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.zeros(1, config.in_channels, 8, 8),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 1, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)},
    }
