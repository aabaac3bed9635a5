"""The training form of K-LoRA, for Cog: pictures in, a LoRA out. What the inputs mean is in klora.training.config.

Cog reads the form from this source text, so every string is one literal and every bound a number (script/schema).
"""

import gc
import logging
import sys
from dataclasses import fields
from pathlib import Path as LocalPath
from typing import Optional

from cog import BaseModel, Input, Path, Secret, current_scope

import weights
from klora.form.inputs import filled, progress_line, uploaded
from klora.interruptible import patch_thread_start
from klora.models import silence_progress_bars
from klora.training.job import TrainingBase, run_training
from klora.training.loop import Progress
from klora.training.publishing import Publishing

# What is imported stays: the collector, which every training calls several times, need not go through it.
gc.freeze()
patch_thread_start()  # here, for Cog starts a thread before it calls train()


class TrainingOutput(BaseModel):
    """weights: a tar with the LoRA, its settings, its log, sample images, a model card, and the state to resume from."""

    weights: Path


def train(
    input_images: Path = Input(
        description="A zip or tar of pictures, with optional captions: a .txt file of the same name for each picture, or a captions.csv."
    ),
    base_model: str = Input(
        description="Base model to train on; the LoRA works on this base and its relatives.",
        choices=["sdxl", "illustrious-xl", "flux-dev"],
        default="sdxl",
    ),
    lora_type: str = Input(
        description="What the pictures have in common: one subject, or one style.",
        choices=["subject", "style"],
        default="subject",
    ),
    trigger_word: Optional[str] = Input(
        description="The word that calls it in prompts. Blank means sbu for a subject and szn for a style.",
        default=None,
    ),
    class_word: Optional[str] = Input(
        description="What the pictures show, in one word, such as dog or portrait. It goes into the prompt of pictures without a caption.",
        default=None,
    ),
    instance_prompt: Optional[str] = Input(
        description="The whole prompt of pictures without a caption, with [trigger] where the trigger word goes. Blank means one made of trigger_word and class_word.",
        default=None,
    ),
    autocaption: bool = Input(
        description="Let a captioning model describe the pictures that have no caption. Skipped if none is installed.",
        default=False,
    ),
    autocaption_prefix: Optional[str] = Input(
        description="Text before each caption by the captioning model.", default=None
    ),
    autocaption_suffix: Optional[str] = Input(
        description="Text after each caption by the captioning model.", default=None
    ),
    steps: int = Input(description="Training steps.", ge=1, le=10000, default=1000),
    learning_rate: Optional[float] = Input(
        description="Learning rate. Blank means 0.00005 on SDXL bases and 0.0001 on flux-dev, and 1 with prodigy.",
        ge=0.00000001,
        le=10,
        default=None,
    ),
    lora_rank: Optional[int] = Input(
        description="Rank of the LoRA. Blank means 8 on SDXL bases and 16 on flux-dev. LoRAs of equal rank fuse best.",
        ge=1,
        le=128,
        default=None,
    ),
    lora_alpha: Optional[float] = Input(
        description="The update is scaled by alpha / rank. Blank means the rank.", ge=0.001, le=1024, default=None
    ),
    lora_targets: str = Input(
        description="Which layers to adapt. LoRAs of the same layers fuse best.",
        choices=["attention", "attention_qkv", "attention_mlp", "all"],
        default="attention",
    ),
    layers_to_optimize_regex: Optional[str] = Input(
        description="For experts: adapt the linear layers whose names this regular expression matches, instead of lora_targets.",
        default=None,
    ),
    resolution: Optional[str] = Input(
        description="Pictures are scaled to the area of squares with these sides in pixels, such as 512,768,1024. Blank means 1024 on SDXL bases and 512,768,1024 on flux-dev.",
        default=None,
    ),
    crop: str = Input(
        description="How pictures are cropped: bucket keeps each picture's shape as far as possible, center crops squares, random crops anywhere, salience around the mask.",
        choices=["bucket", "center", "random", "salience"],
        default="bucket",
    ),
    horizontal_flip: bool = Input(
        description="Also train on mirrored pictures. Harms letters and subjects that are not symmetric.", default=False
    ),
    batch_size: int = Input(description="Pictures per batch.", ge=1, le=16, default=1),
    gradient_accumulation_steps: int = Input(description="Batches per step.", ge=1, le=64, default=1),
    optimizer: str = Input(
        description="Optimizer.", choices=["adamw", "adamw8bit", "prodigy", "lion", "adafactor"], default="adamw"
    ),
    lr_scheduler: str = Input(
        description="Learning rate schedule.", choices=["constant", "linear", "cosine"], default="constant"
    ),
    lr_warmup_steps: int = Input(description="Steps over which the learning rate rises.", ge=0, le=10000, default=0),
    weight_decay: float = Input(description="Weight decay.", ge=0, le=1, default=0.0001),
    max_grad_norm: float = Input(
        description="Gradients are clipped to this norm. 0 means no clipping.", ge=0, le=1000, default=1.0
    ),
    caption_dropout_rate: float = Input(
        description="Share of examples trained without a caption, from 0 to 1.", ge=0, le=1, default=0.0
    ),
    mask_mode: str = Input(
        description="Masks that restrict learning to a part of the pictures: those in the upload (NAME.mask.png), or what clipseg finds.",
        choices=["none", "provided", "clipseg"],
        default="none",
    ),
    mask_prompt: Optional[str] = Input(description="What clipseg looks for. Blank means class_word.", default=None),
    mask_min_weight: float = Input(
        description="Loss weight outside of a mask; inside it is 1.", ge=0, le=1, default=0.1
    ),
    prior_preservation: str = Input(
        description="How the base is kept from forgetting the class: its own output without the trigger word, or pictures of the class that it makes first.",
        choices=["none", "output", "class_images"],
        default="none",
    ),
    class_prompt: Optional[str] = Input(
        description="Prompt of the class to preserve. Blank means one made of class_word; with output, each caption with it in the trigger's place.",
        default=None,
    ),
    num_class_images: int = Input(
        description="Pictures of the class that the base makes before training.", ge=1, le=1000, default=100
    ),
    prior_loss_weight: float = Input(
        description="Weight of the loss that preserves the class.", ge=0, le=100, default=1.0
    ),
    timestep_sampling: str = Input(
        description="Distribution of noise levels. auto is uniform on SDXL bases and logit_normal on flux-dev; content favours noise, style detail; shift is FLUX's own.",
        choices=["auto", "uniform", "logit_normal", "shift", "content", "style"],
        default="auto",
    ),
    snr_gamma: Optional[float] = Input(
        description="Gamma of min-SNR weighting; its authors use 5. Blank means none.", ge=0.001, le=100, default=None
    ),
    noise_offset: float = Input(
        description="Strength of extra noise that is constant over the picture; helps with very dark and bright ones.",
        ge=0,
        le=1,
        default=0.0,
    ),
    ema_decay: float = Input(
        description="Decay of a moving average of the LoRA (EMA), which is then the result. 0 means none.",
        ge=0,
        le=0.9999,
        default=0.0,
    ),
    precision: str = Input(
        description="Precision of the base's weights. auto is bf16, or less if memory is short.",
        choices=["auto", "bf16", "fp32", "int8", "nf4"],
        default="auto",
    ),
    gradient_checkpointing: str = Input(
        description="Compute activations twice to save memory. auto does so if memory is short.",
        choices=["auto", "on", "off"],
        default="auto",
    ),
    compile: str = Input(
        description="Compile the base's blocks. auto does so on a GPU, for runs that are long enough.",
        choices=["auto", "on", "off"],
        default="auto",
    ),
    seed: Optional[int] = Input(
        description="The same seed and pictures give the same LoRA. Blank means a random one, which the log reports.",
        ge=0,
        le=4294967295,
        default=None,
    ),
    sample_prompts: Optional[str] = Input(
        description="Prompts of sample images, one per line. Blank means four made of trigger_word and class_word.",
        default=None,
    ),
    sample_interval: int = Input(
        description="Steps between sample images. 0 means only at the end.", ge=0, le=10000, default=0
    ),
    sample_steps: int = Input(
        description="Denoising steps of a sample image. 0 means no samples.", ge=0, le=100, default=28
    ),
    checkpoint_interval: int = Input(description="Steps between checkpoints. 0 means none.", ge=0, le=10000, default=0),
    keep_checkpoints: int = Input(description="How many of the latest checkpoints are kept.", ge=1, le=100, default=2),
    resume_from: Optional[Path] = Input(
        description="Tar of a finished or stopped training to continue up to steps, with the same base_model and pictures. Other inputs left at their default keep that training's values, except hf_ and wandb_ inputs, which are given anew.",
        default=None,
    ),
    hf_repo_id: Optional[str] = Input(
        description="Hugging Face repository, owner/name, to which the LoRA is uploaded. Blank means none.",
        default=None,
    ),
    hf_token: Optional[Secret] = Input(description="Hugging Face token with the right to write there.", default=None),
    hf_private: bool = Input(
        description="Make that repository private; an existing public one is refused.", default=True
    ),
    wandb_api_key: Optional[Secret] = Input(
        description="Weights & Biases key. Blank means that nothing is reported there.", default=None
    ),
    wandb_project: str = Input(description="Weights & Biases project.", default="klora"),
    wandb_run: Optional[str] = Input(
        description="Name of the Weights & Biases run. Blank means one that it makes up.", default=None
    ),
    wandb_entity: Optional[str] = Input(
        description="Weights & Biases user or team. Blank means the key's.", default=None
    ),
) -> TrainingOutput:
    """Train a LoRA."""
    inputs = filled(locals())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    silence_progress_bars()
    base = TrainingBase(**weights.training_base(inputs.pop("base_model")))
    inputs.setdefault("input_images", "")  # a form's blank field, which is none of those that may be left so
    uploads = {name: uploaded(name, inputs.pop(name)) for name in ("input_images", "resume_from") if name in inputs}
    publishing = {item.name: inputs.pop(item.name) for item in fields(Publishing) if item.name in inputs}
    for name in ("hf_token", "wandb_api_key"):
        if name in publishing:
            publishing[name] = publishing[name].get_secret_value()
    tar = run_training(
        base,
        uploads["input_images"],
        inputs,
        LocalPath("trained_model.tar").resolve(),  # `cog train` on a laptop leaves it there
        resume_from=uploads.get("resume_from"),
        publishing=Publishing(**publishing),
        on_progress=_report,
    )
    return TrainingOutput(weights=Path(tar))


def _report(progress: Progress) -> None:
    print(progress_line(progress.step, progress.steps, str(progress)), flush=True)
    for name in ("loss", "fixed_loss", "steps_per_second"):
        if (value := getattr(progress, name)) is not None:
            current_scope().record_metric(name, value)
