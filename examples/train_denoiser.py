"""How a toy base learns what captions mean: its text encoders first, then its denoiser with them, and then, FLUX.1's
alone, guidance.

Captions are of train_vae's drawings, latents those that save_latents() left.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from examples.architectures import SIDES, toy_flux, toy_sdxl
from examples.lessons import labels, read_captions
from examples.stage import Lesson, Stage, Task
from examples.train_vae import DRAWINGS
from klora import SDXL, Flux
from klora.training.objective import errors

DROPPED = 0.1  # share of captions that are left out, for guidance to begin with
GUIDANCE = (1.0, 6.0)  # what FLUX.1 is told of; 1 adds nothing, and LoRAs are trained there

Inputs = Mapping[str, Tensor]


def train_words(task: Task) -> None:
    """Let the text encoders learn what captions name, before images ask for it: noise drowns what they would teach."""
    model, captions = family(task), read_captions(task.state / DRAWINGS)
    tokens = tokenized(model, captions, task.device)
    named = torch.tensor([labels(caption) for caption in captions], device=task.device).float()
    with torch.no_grad():
        widths = {name: part.shape[-1] for name, part in encoded(model, _rows(tokens, slice(1))).items()}
    heads = nn.ModuleDict({name: nn.Linear(width, named.shape[1]) for name, width in widths.items()}).to(task.device)
    stage = Stage(task, "words", {**model.text_encoders, "heads": heads})

    def lesson(named: Tensor, **tokens: Tensor) -> Inputs:
        read = {name: part.mean(dim=1) if part.ndim == 3 else part for name, part in encoded(model, tokens).items()}
        said = [binary_cross_entropy_with_logits(heads[name](part), named) for name, part in read.items()]
        return {"loss": torch.stack(said).sum()}

    for chance in stage.run():
        chosen = torch.randint(len(captions), (task.batch,), generator=chance, device=task.device)
        stage.learn(lesson, named=named[chosen], **_rows(tokens, chosen))
    stage.finish()
    for name, encoder in model.text_encoders.items():
        encoder.save_pretrained(task.folder / name)


def train_denoiser(task: Task) -> None:
    """The denoiser and both text encoders, through the code that trains LoRAs."""
    model = family(task)
    # Adam steps as far on noise as on news, and would unteach encoders what captions name before the denoiser asks.
    slower = dict.fromkeys(model.text_encoders, 0.2)
    stage = Stage(task, "denoiser", {"denoiser": model.denoiser, **model.text_encoders}, slower)
    if task.device.type == "cpu":
        model.denoiser.compile()

    def lesson(clean: Tensor, noise: Tensor, times: Tensor, guidance: Tensor, kept: Tensor, **tokens: Tensor) -> Inputs:
        conditioning = encoded(model, tokens)
        if task.base == "sdxl":  # whose empty prompt is all zeros
            conditioning = {name: part * kept.view(-1, *[1] * (part.ndim - 1)) for name, part in conditioning.items()}
        # Whatever guidance FLUX.1 is told means the same, until it is taught what guidance means.
        told = _sizes(task, clean) if task.base == "sdxl" else {"guidance": guidance}
        return {"loss": errors(model.predict(clean, noise, times, conditioning | told)).mean()}

    _teach(task, model, stage, lesson)


def train_guidance(task: Task) -> None:
    """FLUX.1's denoiser, to say at once what two passes of itself say, with its caption and without, apart by the
    guidance that it is told: guidance distillation, arXiv:2210.03142, its first stage."""
    model = family(task)
    teacher, own = copy.deepcopy(model.denoiser).requires_grad_(False), model.denoiser
    for encoder in model.text_encoders.values():
        encoder.requires_grad_(False)
    stage = Stage(task, "guidance", {"denoiser": own})
    silent = tokenized(model, [""] * task.batch, task.device)

    def lesson(clean: Tensor, noise: Tensor, times: Tensor, guidance: Tensor, kept: Tensor, **tokens: Tensor) -> Inputs:
        def says(denoiser: nn.Module, tokens: Inputs, guidance: Tensor) -> Tensor:
            model.pipe.transformer = denoiser
            return model.predict(clean, noise, times, encoded(model, tokens) | {"guidance": guidance}).predicted

        with torch.no_grad():
            without, with_caption = (says(teacher, read, torch.ones_like(guidance)) for read in (silent, tokens))
            target = torch.lerp(without, with_caption, guidance[:, None, None, None])
        return {"loss": (says(own, tokens, guidance) - target).square().mean()}

    _teach(task, model, stage, lesson)


def _teach(task: Task, model: Any, stage: Stage, lesson: Lesson) -> None:
    """Take the stage's steps by a lesson on noised latents, and leave the whole base in halves."""
    for inputs in _noised(task, model, stage):
        stage.learn(lesson, **inputs)
    stage.finish()
    model.pipe.to(torch.float16).save_pretrained(task.folder)
    for config in task.folder.glob("text_encoder*/config.json"):
        # transformers would load halves, and diffusers the rest in float32.
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def _noised(task: Task, model: Any, stage: Stage) -> Iterator[dict[str, Tensor]]:
    """The inputs of each step: clean latents and noise [N, C, H, W], times, guidance and whether a caption is kept [N],
    and the captions' tokens."""
    latents = load_file(task.state / f"{task.base}-latents.safetensors")["latents"].to(task.device)
    captions = read_captions(task.state / DRAWINGS)
    tokens, silent = (tokenized(model, said, task.device) for said in (captions, [""]))
    for chance in stage.run():
        draw = {"generator": chance, "device": task.device}
        chosen = torch.randint(len(latents), (task.batch,), **draw)
        clean = latents[chosen]
        times, guidance, kept = torch.rand(3, task.batch, **draw)
        if task.base != "sdxl":  # whose own levels dwell there already
            # What a prompt decides shows through most noise, and so is learnt near the noisy end alone.
            times = 3 * times / (1 + 2 * times)
        kept = kept > DROPPED
        read = {name: torch.where(kept[:, None], part, silent[name]) for name, part in _rows(tokens, chosen).items()}
        inputs = {"clean": clean, "noise": torch.randn(clean.shape, **draw), "times": times, "kept": kept.float()}
        yield inputs | {"guidance": GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * guidance} | read


def tokenized(model: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """What each text encoder reads of captions: int64 [N, tokens]."""
    tokenizers = {"text_encoder": model.pipe.tokenizer, "text_encoder_2": model.pipe.tokenizer_2}
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return {name: tokenizer(captions, **options).input_ids.to(device) for name, tokenizer in tokenizers.items()}


def encoded(model: Any, tokens: Inputs) -> dict[str, Tensor]:
    """The conditioning of captions, as the family's encode_prompt() has it, of tokens that lie on the device."""
    first, second = (model.text_encoders[name](tokens[name], output_hidden_states=True) for name in tokens)
    if model.name == "SDXL":
        embeds = torch.cat([read.hidden_states[-2] for read in (first, second)], dim=-1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": second.text_embeds}
    return {"prompt_embeds": second.last_hidden_state, "pooled_prompt_embeds": first.pooler_output}


def _rows(tokens: Inputs, chosen: Any) -> dict[str, Tensor]:
    return {name: part[chosen] for name, part in tokens.items()}


def _sizes(task: Task, clean: Tensor) -> dict[str, Tensor]:
    """What SDXL is told of its pictures' sizes, made where the latents are."""
    side = SIDES[task.base]
    ids = torch.stack([clean.new_full((len(clean),), pixels) for pixels in (side, side, 0, 0, side, side)], dim=1)
    return {"time_ids": ids}


def family(task: Task) -> Any:
    """The base as klora has it, to be trained: T5 would drop out."""
    torch.manual_seed(1)
    model = (SDXL if task.base == "sdxl" else Flux)(pipeline(task).to(task.device))
    for module in (model.denoiser, *model.text_encoders.values()):
        module.eval()
    if task.base == "sdxl":
        model.denoiser.to(memory_format=torch.channels_last)
    return model


def pipeline(task: Task) -> Any:
    """The whole base in float32: as the stage before left it, or new, but for the VAE and for what knows words."""
    if (task.folder / "model_index.json").is_file():
        pipe = diffusers.DiffusionPipeline.from_pretrained(task.folder, dtype=torch.float32)
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(task.folder / "vae", dtype=torch.float32)
        pipe = (toy_sdxl if task.base == "sdxl" else toy_flux)(vae)
        for folder in task.folder.glob("text_encoder*"):
            encoder = type(pipe.components[folder.name])
            pipe.register_modules(**{folder.name: encoder.from_pretrained(folder, dtype=torch.float32)})
    for part in (pipe, *pipe.components.values()):
        if isinstance(part, diffusers.ConfigMixin):
            part.register_to_config(_name_or_path=task.base)  # not this machine's path, which would be saved
    pipe.vae.requires_grad_(False)
    return pipe
