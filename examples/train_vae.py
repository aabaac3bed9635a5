"""How a toy base gets its VAE: pixels to latents and back, then the decoder alone, then the latents of all scenes.

Drawings are those of save_drawings(), in DRAWINGS; pictures have the side that the base draws.
"""

import shutil

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.architectures import CELL, LATENT_CHANNELS, SIDES, toy_vae
from examples.latents import even_out, rms, unlikeness
from examples.lessons import levels, read_drawings
from examples.stage import Stage, Task

DRAWINGS = "drawings.safetensors"
MEASURED = 512  # scenes by which latents are evened out


def train_vae(task: Task) -> None:
    """A new VAE, on drawings in every style, those of LoRAs too: a LoRA cannot teach it."""
    base, device = task.base, task.device
    shutil.rmtree(task.folder, ignore_errors=True)  # what is left of another training
    torch.manual_seed(0)
    vae = toy_vae(base).to(device, memory_format=torch.channels_last)
    torch.nn.init.constant_(vae.encoder.conv_out.bias[LATENT_CHANNELS[base] :], -6)  # hardly any noise to begin with
    others = read_drawings(task.state / DRAWINGS, "others").to(device)
    stage = Stage(task, "vae", {"vae": vae})

    def lesson(pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        # Noise beyond the posterior's own teaches the decoder to see past a denoiser's small errors.
        drawn = vae.decode(posterior.mean + (posterior.var + 0.01).sqrt() * noise).sample
        loss = unlikeness(drawn - pixels) + 1e-4 * posterior.kl().mean() / noise[0].numel()
        return {"loss": loss, "rms": rms(drawn - pixels)}

    for chance in stage.run():
        stage.learn(lesson, pixels=_some(others, task, chance), noise=_noise(task, chance))
    stage.finish()
    even_out(vae, levels(read_drawings(task.state / DRAWINGS, "scenes")[:MEASURED].to(device), SIDES[base]))
    vae.to(torch.float16).save_pretrained(task.folder / "vae")


def train_decoder(task: Task) -> None:
    """The VAE's decoder alone, which may then look longer at colours and past a denoiser's errors."""
    vae = _trained(task)
    vae.encoder.requires_grad_(False)
    others = read_drawings(task.state / DRAWINGS, "others").to(task.device)
    stage = Stage(task, "decoder", {"decoder": vae.decoder})

    def lesson(pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean
        drawn = vae.decode(latents + noise).sample
        return {"loss": unlikeness(drawn - pixels), "rms": rms(drawn - pixels)}

    for chance in stage.run():
        blur = 0.3 * torch.rand(task.batch, 1, 1, 1, generator=chance, device=task.device)
        stage.learn(lesson, pixels=_some(others, task, chance), noise=blur * _noise(task, chance))
    stage.finish()
    vae.register_to_config(_name_or_path=task.base)
    vae.to(torch.float16).save_pretrained(task.folder / "vae")


def save_latents(task: Task) -> None:
    """Leave the scaled latents of all scenes in a file: "latents", float32 [N, C, H, W]."""
    vae, found = _trained(task), []
    for pixels in read_drawings(task.state / DRAWINGS, "scenes").split(task.batch):
        with torch.no_grad():
            latents = vae.encode(levels(pixels.to(task.device), SIDES[task.base])).latent_dist.mean
        found.append(latents.cpu().contiguous() * vae.config.scaling_factor)
    save_file({"latents": torch.cat(found)}, task.state / f"{task.base}-latents.safetensors")


def _trained(task: Task) -> diffusers.AutoencoderKL:
    vae = diffusers.AutoencoderKL.from_pretrained(task.folder / "vae", dtype=torch.float32)
    return vae.to(task.device, memory_format=torch.channels_last)


def _some(drawings: Tensor, task: Task, chance: torch.Generator) -> Tensor:
    chosen = torch.randint(len(drawings), (task.batch,), generator=chance, device=task.device)
    return levels(drawings[chosen], SIDES[task.base]).contiguous(memory_format=torch.channels_last)


def _noise(task: Task, chance: torch.Generator) -> Tensor:
    cells = SIDES[task.base] // CELL[task.base]
    shape = (task.batch, LATENT_CHANNELS[task.base], cells, cells)
    return torch.randn(shape, generator=chance, device=task.device)
