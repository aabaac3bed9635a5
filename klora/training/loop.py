"""One training loop for every family: texts encoded once, images encoded once, then the denoiser's LoRA is fitted.

A family contributes encode_prompt, encode_images and loss. Every random draw comes from a generator keyed by the seed
and the number of the draw, so that a resumed run is the same run. Knows no Cog, no archive and no file but its own.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from klora.layers import trainable
from klora.lora import LoRA, LowRank
from klora.models.family import Conditioning, Family, Posterior, linear_shapes
from klora.training.buckets import Crop, batches, buckets, fit, nearest_bucket
from klora.training.config import TrainConfig
from klora.training.dataset import Picture, captioned

OnStep = Callable[[int, float], None]
"""(steps done, loss of the last one) -> ignored"""


@dataclass(frozen=True)
class Example:
    """One picture at one resolution, ready to be trained on: all on the CPU, float32."""

    posterior: Posterior
    time_ids: Tensor
    caption: str
    size: tuple[int, int]


class Objective(nn.Module):
    """The loss as a module, so that accelerate can run it on several processes."""

    def __init__(self, model: Family) -> None:
        super().__init__()
        self.denoiser = model.denoiser
        self._loss = model.loss

    def forward(self, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        return self._loss(latents, conditioning, generator).mean()


def train_lora(
    model: Family,
    pictures: Sequence[Picture],
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    on_step: OnStep = lambda step, loss: None,
) -> LoRA:
    """Fit a LoRA to pictures. checkpoint: a file that holds the run every checkpoint_interval steps, and from which it
    goes on when it is there. The base is as it was afterwards, by whatever exception one leaves."""
    examples = list(_examples(model, pictures, config))
    texts = _encoded_texts(model, {example.caption for example in examples} | {""})
    device = next(model.denoiser.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu")
    layers = new_layers(model, config)
    with _frozen(model.denoiser), trainable(model.denoiser, layers):
        _fit(model, layers, examples, texts, config, accelerator, checkpoint, on_step)
    fitted = {name: LowRank(pair.A.detach().cpu(), pair.B.detach().cpu()) for name, pair in layers.items()}
    return LoRA(fitted)


def new_layers(model: Family, config: TrainConfig) -> dict[str, LowRank]:
    """Fresh float32 pairs for the layers to adapt: A ~ N(0, 1/rank²), as in the published recipe, and B = 0."""
    rank, device = config.lora_rank or model.lora_rank, next(model.denoiser.parameters()).device
    shapes = linear_shapes(model.denoiser)
    layers = {}
    for name in config.targets(shapes):
        outputs, inputs = shapes[name]
        A = torch.randn(rank, inputs, generator=_generator(config.seed, "A", name)) / rank
        layers[name] = LowRank(nn.Parameter(A.to(device)), nn.Parameter(torch.zeros(outputs, rank, device=device)))
    return layers


def _examples(model: Family, pictures: Sequence[Picture], config: TrainConfig) -> Iterator[Example]:
    """Every picture at every resolution. The VAE sees each once; its posterior is kept, not one sample of it."""
    for resolution in config.resolutions or (model.native_size,):
        sizes = buckets(resolution)
        for picture in pictures:
            image = picture.open()
            size = nearest_bucket(image.size, sizes)
            crop: Crop = fit(image, size, mode=config.crop, flip=False, generator=_generator(config.seed, picture.name))
            with torch.no_grad():
                posterior = Posterior(*(part[0].float().cpu() for part in model.encode_images(crop.pixels[None])))
            caption = captioned(picture, config.trigger, config.prompt)
            yield Example(posterior, torch.tensor(crop.time_ids, dtype=torch.float32), caption, size)


def _encoded_texts(model: Family, captions: set[str]) -> dict[str, Conditioning]:
    """What the text encoders make of each caption, once, on the CPU."""
    with torch.no_grad():
        encoded = {caption: model.encode_prompt([caption]) for caption in sorted(captions)}
    return {
        caption: {name: tensor.cpu() for name, tensor in parts.items() if not name.startswith("negative")}
        for caption, parts in encoded.items()
    }


def _fit(
    model: Family,
    layers: Mapping[str, LowRank],
    examples: Sequence[Example],
    texts: Mapping[str, Conditioning],
    config: TrainConfig,
    accelerator: Accelerator,
    checkpoint: Path | None,
    on_step: OnStep,
) -> None:
    parameters = [factor for pair in layers.values() for factor in (pair.A, pair.B)]
    learning_rate = config.learning_rate or model.learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = LambdaLR(optimizer, lambda step: _rate(step, config))
    objective = accelerator.prepare(Objective(model))
    done = _load(checkpoint, parameters, optimizer, schedule) if checkpoint and checkpoint.is_file() else 0
    draws = _draws(examples, config, accelerator, done)
    for step in range(done, config.steps):
        losses = []
        for part in range(config.gradient_accumulation_steps):
            number, indices = next(draws)
            generator = _generator(config.seed, "draw", number)
            latents, conditioning = _batch([examples[i] for i in indices], texts, config, generator, accelerator.device)
            last = part == config.gradient_accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(objective):
                loss = objective(latents, conditioning, generator) / config.gradient_accumulation_steps
                accelerator.backward(loss)
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, float(torch.stack(losses).sum()))
        if checkpoint and config.checkpoint_interval and (step + 1) % config.checkpoint_interval == 0:
            _save(checkpoint, step + 1, parameters, optimizer)


def _rate(step: int, config: TrainConfig) -> float:
    """The learning rate at a step, 0-based, as a share of the one asked for: a linear warm-up, then the schedule."""
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    done = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_scheduler]


def _draws(
    examples: Sequence[Example], config: TrainConfig, accelerator: Accelerator, done: int
) -> Iterator[tuple[int, list[int]]]:
    """(number of the draw, indices of its examples) from the first draw after `done` steps, this process's share."""
    sizes = [example.size for example in examples]
    epoch, planned = 0, batches(sizes, config.batch_size, seed=config.seed, epoch=0)
    number = done * config.gradient_accumulation_steps * accelerator.num_processes + accelerator.process_index
    while True:
        if number // len(planned) != epoch:  # every epoch has as many batches
            epoch = number // len(planned)
            planned = batches(sizes, config.batch_size, seed=config.seed, epoch=epoch)
        yield number, planned[number % len(planned)]
        number += accelerator.num_processes


def _batch(
    examples: Sequence[Example],
    texts: Mapping[str, Conditioning],
    config: TrainConfig,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Conditioning]:
    """Fresh samples of the examples' posteriors, and their captions, some of them dropped."""
    mean, std = (torch.stack([example.posterior[part] for example in examples]) for part in (0, 1))
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(len(examples), generator=generator) < config.caption_dropout_rate
    captions = ["" if drop else example.caption for drop, example in zip(dropped, examples, strict=True)]
    conditioning = {name: torch.cat([texts[c][name] for c in captions]).to(device) for name in texts[captions[0]]}
    conditioning["time_ids"] = torch.stack([example.time_ids for example in examples]).to(device)
    return latents.to(device), conditioning


def _save(path: Path, step: int, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """The run as it stands, in one file that appears whole. Draws are keyed by their number: the step says them all."""
    moments = [optimizer.state[parameter] for parameter in parameters]
    tensors = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(parameters)}
    tensors |= {f"{key}.{i}": value for i, state in enumerate(moments) for key, value in state.items()}
    tensors = {key: tensor.cpu().clone() for key, tensor in tensors.items()}
    save_file(tensors, path.with_suffix(".part"), {"step": str(step)})
    path.with_suffix(".part").replace(path)


def _load(path: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> int:
    """Take a run up where _save left it; the number of steps done."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: tensors[f"{key}.{i}"].to(parameter.device) for key in keys}
    schedule.last_epoch = step - 1
    schedule.step()  # sets the rate that this step has
    return step


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """The base learns nothing meanwhile: its parameters ask for no gradient, and ask again as before afterwards."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator for one purpose, the same wherever and whenever it is asked for."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
