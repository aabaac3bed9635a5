"""FLUX.1: dev and schnell, on diffusers' own pipelines. Knows nothing of fusion."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch import Tensor, nn

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
    denoise,
    encoders,
    inventory_of,
    load_parts,
    quantization,
    word_widths,
)
from klora.models.prompts import check_length


class Flux:
    """The FLUX.1 family: dev has a guidance embedding; schnell has none and needs few steps."""

    name: ClassVar[str] = "FLUX.1"
    component: ClassVar[str] = "transformer"
    size_multiple: ClassVar[int] = 16
    negative_prompts: ClassVar[bool] = False
    host_bound: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(1e-4, rank=16, times="logit_normal", resolutions=(0.5, 0.75, 1.0))
    schedulers: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, pipe: FluxPipeline) -> None:
        self.pipe = pipe
        self.compiled: Compiled | None = None
        self.denoiser: nn.Module = pipe.transformer
        self.text_encoders = encoders(pipe)
        self.native_size: int = pipe.vae.config.sample_size
        self._guided: bool = pipe.transformer.config.guidance_embeds
        self.steps, self.guidance_scale = (28, 3.5) if self._guided else (4, 0.0)

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        parts: Collection[Part] = EVERY_PART,
        quantized: Quantized | None = None,
    ) -> "Flux":
        options = quantization(cls.component, quantized, dtype)
        return cls(load_parts(FluxPipeline, path, device, parts, dtype=dtype, **options))

    @staticmethod
    def recognises(keys: list[str]) -> bool:
        name = r"(single|double)_blocks|single_transformer_blocks|transformer_blocks[._]\d+[._](attn[._]|norm1_|ff_con)"
        return any(re.search(name, key) for key in keys)

    def read_lora(self, path: Path | str) -> LoRA:
        return read_lora(path, self.inventory, FluxPipeline.lora_state_dict, word_widths(self))

    def encode_prompt(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        """negative_prompts have no effect: a guidance-distilled model steers away from nothing.

        CLIP, of which the pooled output alone is taken, reads the beginning. Raises RequestError for what T5 would cut.
        """
        device = self.pipe.text_encoder.device
        length = min(512 if self._guided else 256, self.pipe.tokenizer_2.model_max_length)
        for prompt in prompts:
            check_length(self.pipe.tokenizer_2, prompt, length - 1)  # T5 reads an end, too
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=device, max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_images(self, pixels: Tensor) -> Posterior:
        vae = self.pipe.vae
        posterior, scale = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist, vae.config.scaling_factor
        return Posterior((posterior.mean - vae.config.shift_factor) * scale, posterior.std * scale)

    def predict(self, latents: Tensor, noise: Tensor, times: Tensor, conditioning: Conditioning) -> Prediction:
        """The velocity, noise - latents, on the straight line between them; times are the sigmas.

        conditioning may hold "guidance" [N], what the guidance embedding is told; without it 1, which leaves the
        distillation alone.
        """
        transformer = self.pipe.transformer
        embeds = conditioning["prompt_embeds"].to(transformer.dtype)
        height, width = (side // 2 for side in latents.shape[-2:])
        mixed = FluxPipeline._pack_latents(torch.lerp(latents, noise, times[:, None, None, None]), *latents.shape)
        predicted = transformer(
            hidden_states=mixed.to(transformer.dtype),
            timestep=times,
            guidance=conditioning.get("guidance", torch.ones_like(times)) if self._guided else None,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(transformer.dtype),
            img_ids=_image_ids(height, width, embeds),
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
        ).sample
        factor = self.pipe.vae_scale_factor
        cells = FluxPipeline._unpack_latents(predicted.float(), 2 * height * factor, 2 * width * factor, factor)
        return Prediction(cells, noise - latents, (1 / times - 1).square(), times**-2)

    def sample(
        self, conditioning: Conditioning, request: Request, on_step: Callable[[int], Any], seeds: Sequence[int] = ()
    ) -> list[Image.Image]:
        vae, processor, scheduler = self.pipe.vae, self.pipe.image_processor, self.pipe.scheduler
        scheduler = type(scheduler).from_config(scheduler.config)  # of the request's own: it keeps state between steps
        width, height = request.size(self.native_size, self.size_multiple)
        pipeline, options = FluxPipeline, dict[str, Any](width=width, height=height)
        given = framed(request.image, request.mask, (width, height))
        if "image" in given:
            latents, strength = self.encode_images(processor.preprocess(given["image"])).mean, request.prompt_strength
            # The pipeline rounds steps up: 0.8 of schnell's four to all of them, which start from noise alone.
            most = 1 - (strength < 1) / (request.num_inference_steps or self.steps)
            pipeline, options = FluxImg2ImgPipeline, options | {"image": latents, "strength": min(strength, most)}
        if "mask" in given:
            pipeline = FluxInpaintPipeline
            mask = cellwise(given["mask"], self.pipe.vae_scale_factor)
            options |= {"mask_image": mask, "masked_image_latents": options["image"]}
        pipe = pipeline(**self.pipe.components | {"scheduler": scheduler})
        packed = denoise(pipe, self, conditioning, request, on_step, seeds, **options)
        latents = FluxPipeline._unpack_latents(packed, height, width, self.pipe.vae_scale_factor)
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        return overlaid(processor.postprocess(decoded), given)

    @cached_property
    def inventory(self) -> Inventory:
        return inventory_of(self, _smallest_call)


def _smallest_call(transformer: Any) -> dict[str, Tensor | None]:
    """Keyword arguments for a token of an image and one of a prompt."""
    config = transformer.config
    return {
        "hidden_states": torch.zeros(1, 1, config.in_channels),
        "encoder_hidden_states": torch.zeros(1, 1, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1) if config.guidance_embeds else None,
        "img_ids": torch.zeros(1, 3),
        "txt_ids": torch.zeros(1, 3),
    }


def _image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Where the tokens are, [height * width, 3], as the pipeline has it, made where they are: no step waits for it."""
    rows, columns = (torch.arange(side, device=like.device, dtype=like.dtype) for side in (height, width))
    return torch.cartesian_prod(like.new_zeros(1), rows, columns)
