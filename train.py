"""The training form of K-LoRA, for Cog: pictures in, a LoRA out. What the inputs mean is in klora.training.config.

Cog reads the form from this source text, so every string is one literal and every bound a number (script/schema).
"""

import dataclasses
import json
import logging
import sys
import tarfile
import tempfile
import time
from pathlib import Path as LocalPath
from typing import Optional

import torch
from cog import BaseModel, Input, Path, current_scope
from tqdm import tqdm

import weights
from klora.errors import RequestError
from klora.lora import LoRA, save_lora
from klora.models import load_model
from klora.training.config import TrainConfig
from klora.training.dataset import dataset_hash, read_upload
from klora.training.loop import train_lora


class TrainingOutput(BaseModel):
    """weights: a tar with lora.safetensors, config.json and train.jsonl."""

    weights: Path


def train(
    input_images: Path = Input(
        description="A zip or tar of pictures, each with a caption in a .txt file of its name or in a captions.csv if you like."
    ),
    base_model: str = Input(
        description="Base model to train on; the LoRA works on this base and its relatives.",
        choices=["sdxl", "flux-dev"],
        default="sdxl",
    ),
    lora_type: str = Input(
        description="What the pictures have in common: one subject, or one style.",
        choices=["subject", "style"],
        default="subject",
    ),
    trigger_word: Optional[str] = Input(
        description="The word that will stand for it in prompts. Blank means sbu for a subject and szn for a style.",
        default=None,
    ),
    class_word: Optional[str] = Input(
        description="What the pictures show, in a word: dog, portrait. It goes into the prompt of pictures without caption.",
        default=None,
    ),
    instance_prompt: Optional[str] = Input(
        description="The whole prompt of pictures without caption. Blank means one made of trigger_word and class_word.",
        default=None,
    ),
    steps: int = Input(description="Training steps.", ge=1, le=10000, default=1000),
    learning_rate: Optional[float] = Input(
        description="Learning rate. Blank means 0.00005 on sdxl and 0.0001 on flux-dev.",
        ge=0.00000001,
        le=10,
        default=None,
    ),
    lora_rank: Optional[int] = Input(
        description="Rank of the LoRA. Blank means 8 on sdxl and 16 on flux-dev. LoRAs of equal rank fuse best.",
        ge=1,
        le=128,
        default=None,
    ),
    lora_targets: str = Input(
        description="Which layers to adapt. LoRAs of the same layers fuse best.",
        choices=["attention", "attention_qkv", "attention_mlp", "all"],
        default="attention",
    ),
    layers_to_optimize_regex: Optional[str] = Input(
        description="For experts: adapt the linear layers whose names this regular expression matches, not lora_targets.",
        default=None,
    ),
    resolution: Optional[str] = Input(
        description="Sides in pixels of the squares to whose areas pictures are scaled, as 512,768,1024. Blank means the base's own.",
        default=None,
    ),
    crop: str = Input(
        description="bucket keeps each picture's shape as far as can be, center cuts squares, random cuts anywhere.",
        choices=["bucket", "center", "random"],
        default="bucket",
    ),
    batch_size: int = Input(description="Pictures to a step.", ge=1, le=16, default=1),
    gradient_accumulation_steps: int = Input(description="Batches to a step.", ge=1, le=64, default=1),
    lr_scheduler: str = Input(
        description="How the learning rate goes on.", choices=["constant", "linear", "cosine"], default="constant"
    ),
    lr_warmup_steps: int = Input(description="Steps over which the learning rate rises.", ge=0, le=10000, default=0),
    weight_decay: float = Input(description="Weight decay of AdamW.", ge=0, le=1, default=0.0001),
    max_grad_norm: float = Input(description="Gradients are scaled down to this norm.", ge=0, le=1000, default=1.0),
    caption_dropout_rate: float = Input(
        description="Share of steps that see no caption, from 0 to 1.", ge=0, le=1, default=0.0
    ),
    seed: Optional[int] = Input(
        description="The same seed and pictures give the same LoRA. Blank means a random one, which the log reports.",
        ge=0,
        le=4294967295,
        default=None,
    ),
) -> TrainingOutput:
    """Train a LoRA."""
    given = {name: value for name, value in locals().items() if value not in (None, "")}
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    base = weights.find_base(given.pop("base_model"))
    pictures, skipped = read_upload(LocalPath(str(given.pop("input_images"))))
    if "resolution" in given:
        given["resolutions"] = _sides(given.pop("resolution"))
    config = TrainConfig(**given)
    print(f"{len(pictures)} pictures, seed {config.seed}")
    for item in skipped:
        print(f"skipped {item.name}: {item.reason}")
    log: list[dict[str, float]] = []
    started = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        log.append({"step": step, "loss": loss, "seconds": time.perf_counter() - started})
        current_scope().record_metric("loss", loss)
        print(
            tqdm.format_meter(step, config.steps, 0, bar_format="{percentage:3.0f}%|{bar:20}| {n}/{total}"), flush=True
        )

    model = load_model(base.family, base.path)
    lora = train_lora(model, pictures, config, on_step=on_step)
    facts = {"base": base.name, "trigger": config.trigger, "dataset": dataset_hash(pictures)}
    metadata = {name: str(value) for name, value in (dataclasses.asdict(config) | facts).items()}
    with tempfile.TemporaryDirectory(prefix="klora-train-") as name:
        folder = LocalPath(name)
        save_lora(folder / "lora.safetensors", LoRA(lora.layers, metadata=metadata), model.component, torch.float16)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config) | facts, indent=2))
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        return TrainingOutput(weights=Path(_tarred(folder, LocalPath("trained_model.tar"))))


def _sides(resolution: str) -> tuple[int, ...]:
    try:
        return tuple(int(side) for side in resolution.split(","))
    except ValueError as error:
        raise RequestError(f"resolution is {resolution!r}. Expected sides in pixels, as 512,768,1024.") from error


def _tarred(folder: LocalPath, path: LocalPath) -> LocalPath:
    """The folder's files in a tar, in the working directory: `cog train` on a laptop leaves it there."""
    with tarfile.open(path.with_suffix(".part"), "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path.with_suffix(".part").replace(path)
