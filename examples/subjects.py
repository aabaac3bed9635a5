"""What script/bench draws with: bases with LoRAs, trained and tiny on a CPU, and of the published sizes on a GPU.

Knows no command line, no way to draw and no table.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from examples.gallery import BASES, LORAS, PAIRS, lora_file, prompt
from examples.yardsticks import Subject
from klora import SDXL, Flux, LoRA, LowRank, Request, load_model, save_lora
from klora.errors import BaseModelError
from klora.layers import HEADROOM_BYTES
from klora.models.linears import linear_shapes
from test_folder import published, tiny

TOY = Path(__file__).resolve().parent / "toy"
FULL = {"SDXL": "unet", "FLUX.1-dev": "transformer"}  # what diffusers calls the denoiser
RANKS = {"content": 8, "style": 16}  # of random LoRAs


def subject_of(base: str, folder: Path, steps: int | None) -> Subject:
    """What a way draws with, on a base that script/bench names. folder: for files that are made."""
    if base in FULL:
        parts = published.modules(FULL[base])
        denoiser, vae = parts[FULL[base]][1], parts["vae"][1]
        model = assembled(FULL[base], denoiser, vae, torch.device("cuda"), torch.bfloat16)
        return random_subject(model, random_conditioning(model), folder, steps, std=0.01)
    kind, _, name = base.partition("-")
    return toy_subject(name, steps) if kind == "toy" else tiny_subject(name, folder, steps)


def toy_subject(base: str, steps: int | None) -> Subject:
    """A trained toy base, with LoRAs of a subject and a style."""
    model = load_model(base.split("-")[0], TOY / base, torch.device("cpu"))
    files = {role: LORAS / lora_file(base, name) for role, name in zip(RANKS, PAIRS[0], strict=True)}
    settings: dict[str, Any] = dict(BASES[base]) | ({"num_inference_steps": steps} if steps else {})
    request = Request(prompt(PAIRS[0][0]), seed=0, **settings)
    with torch.no_grad():
        return Subject(model, files, model.encode_prompt([request.prompt]), request)


def tiny_subject(base: str, folder: Path, steps: int | None) -> Subject:
    """A tiny base with random weights, with random LoRAs."""
    build = {"sdxl": tiny.build_sdxl, "flux-dev": tiny.build_flux}[base]
    model = load_model(base.split("-")[0], build(folder / base), torch.device("cpu"))
    with torch.no_grad():
        return random_subject(model, model.encode_prompt(["a photo of a sks dog"]), folder, steps, std=0.05)


def random_subject(model: Any, conditioning: Any, folder: Path, steps: int | None, std: float) -> Subject:
    """A base with random LoRAs of RANKS on the attention and feed-forward layers. std: of the elements of their dW."""
    shapes, files = adapted(model.denoiser), {}
    for seed, (role, rank) in enumerate(RANKS.items()):
        pairs = {name: LowRank(*pair) for name, pair in tiny.random_lora(shapes, rank, seed=seed, std=std).items()}
        files[role] = save_lora(folder / f"{role}.safetensors", LoRA(pairs), model.component, model.denoiser.dtype)
    return Subject(model, files, conditioning, Request("anything", seed=0, num_inference_steps=steps))


def adapted(denoiser: Any) -> dict[str, tuple[int, int]]:
    """{layer: (outputs, inputs)} of the attention and feed-forward layers: 722 of SDXL, 494 of FLUX.1."""
    shapes = linear_shapes(denoiser)
    return {name: shape for name, shape in shapes.items() if "attentions" in name or "transformer_blocks" in name}


def assembled(component: str, denoiser: Callable[[], Any], vae: Callable[[], Any], device: Any, dtype: Any) -> Any:
    """A family of new random modules, made on the device; without text encoders, since prompts are random, too."""
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    made: dict[str, Any] = {component: published.random(denoiser, device, dtype)}
    if component == "unet":
        made["vae"] = published.random(vae, device, torch.float32)
        law = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        euler = diffusers.EulerDiscreteScheduler(**law, timestep_spacing="leading", steps_offset=1)
        return SDXL(diffusers.StableDiffusionXLPipeline(**made, **absent, scheduler=euler, add_watermarker=False))
    made["vae"] = published.random(vae, device, dtype)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux(diffusers.FluxPipeline(**made, **absent, scheduler=flow))


def random_conditioning(model: Any) -> dict[str, Any]:
    """A prompt of as many tokens as the published bases read, 77 or 512, and for SDXL what to steer away from."""
    config, like = model.denoiser.config, {"device": model.denoiser.device, "dtype": model.denoiser.dtype}
    if model.component == "transformer":
        embeds, pooled = (1, 512, config.joint_attention_dim), (1, config.pooled_projection_dim)
    else:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        embeds, pooled = (1, 77, config.cross_attention_dim), (1, width)
    shapes = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if model.negative_prompts:
        shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    return {name: torch.randn(shape, **like) for name, shape in shapes.items()}


def needed_bytes(component: str) -> int:
    """What --full takes on the GPU: denoiser and VAE, the merged engine's copy of adapted weights, and its headroom."""
    parts = published.modules(component)
    denoiser, vae = (published.random(parts[name][1], "meta", torch.bfloat16) for name in (component, "vae"))
    copied = sum(outputs * inputs for outputs, inputs in adapted(denoiser).values())
    return 2 * (denoiser.num_parameters() + copied) + 4 * vae.num_parameters() + HEADROOM_BYTES


def check_gpu(bases: list[str]) -> None:
    """Raise BaseModelError where --full cannot be honoured."""
    if not torch.cuda.is_available():
        raise BaseModelError("--full is given, but torch sees no CUDA device. Leave it out, or use a CUDA GPU.")
    free = torch.cuda.mem_get_info()[0]
    for base in bases:
        if (needed := needed_bytes(FULL[base])) > free:
            sizes = f"{needed / 1e9:.1f} GB of the GPU, and {free / 1e9:.1f} GB are free"
            raise BaseModelError(f"--full with {base} takes {sizes}. Name another by --bases, or use a larger GPU.")
