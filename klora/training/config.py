"""The settings of a training: the form's fields, their bounds, and defaults that depend on lora_type or the base."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from klora.errors import RequestError
from klora.form.fields import MAX_SEED, ask, check, random_seed

TRIGGERS = {"subject": "sbu", "style": "szn"}  # the published recipe's words
TEMPLATES = {"subject": "a {trigger} {word}", "style": "a {word} in {trigger} style"}
WORDS = {"subject": "subject", "style": "picture"}
SCENES = {
    "subject": ("a {trigger} {word}", "a {trigger} {word} in a bucket", "a {trigger} {word} on a beach",
                "a painting of a {trigger} {word}"),
    "style": ("a {word} in {trigger} style", "a man in {trigger} style", "a dog in {trigger} style",
              "a house by the sea in {trigger} style"),
}  # fmt: skip

_ATTENTION = r"attn\d?\.(to_q|to_k|to_v|to_out\.0)$"
TARGETS = {
    "attention": _ATTENTION,
    "attention_qkv": r"attn\d?\.(to_q|to_k|to_v)$",
    "attention_mlp": rf"{_ATTENTION}|(ff|ff_context)\.net\.\d|proj_mlp$|transformer_blocks\.\d+\.proj_out$",
    "all": r"transformer_blocks\.\d+\.",
}
"""{lora_targets: what to search for in the names of linear layers}; "attention" finds 560 on SDXL and 190 on FLUX.1,
where "all" finds 494."""

# With this learning_rate the rate that Prodigy finds stayed at its initial 1e-6 for 1000 steps of a small regression.
STUCK_PRODIGY_RATE = 0.1

STRIPPED = ("trigger_word", "class_word", "class_prompt", "mask_prompt")
NO_EFFECT = {
    "autocaption_prefix": ("autocaption", (False,)), "autocaption_suffix": ("autocaption", (False,)),
    "mask_prompt": ("mask_mode", ("none", "provided")), "mask_min_weight": ("mask_mode", ("none",)),
    "class_prompt": ("prior_preservation", ("none",)), "prior_loss_weight": ("prior_preservation", ("none",)),
    "num_class_images": ("prior_preservation", ("none", "output")), "keep_checkpoints": ("checkpoint_interval", (0,)),
    "sample_prompts": ("sample_steps", (0,)), "sample_interval": ("sample_steps", (0,)),
}  # fmt: skip
"""{setting: (another one, its values with which the first has no effect)}"""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training, by the form's names, checked on creation. None: the default in the description.

    Raises RequestError.
    """

    lora_type: str = ask("subject", "What the pictures have in common.", choices=tuple(TRIGGERS))
    trigger_word: str = ask("", "The word that calls it in prompts. Default: sbu for a subject, szn for a style.")
    class_word: str = ask("", "What the pictures show, in one word, such as dog or portrait.")
    instance_prompt: str = ask(
        "", "Prompt of pictures without a caption, with [trigger] in it. Default: made of the two words above."
    )
    autocaption: bool = ask(False, "Let a captioning model describe the pictures that have no caption.")
    autocaption_prefix: str = ask("", "Text before each caption by the captioning model.")
    autocaption_suffix: str = ask("", "Text after each caption by the captioning model.")
    steps: int = ask(1000, "Training steps.", ge=1, le=10000)
    learning_rate: float | None = ask(None, "Default: 5e-5 on SDXL, 1e-4 on FLUX.1, 1 with Prodigy.", ge=1e-8, le=10)
    lora_rank: int | None = ask(None, "Rank. Default: 8 on SDXL, 16 on FLUX.1.", ge=1, le=128)
    lora_alpha: float | None = ask(None, "The update is scaled by alpha / rank. Default: the rank.", ge=1e-3, le=1024)
    lora_targets: str = ask("attention", "Which layers to adapt.", choices=tuple(TARGETS))
    layers_to_optimize_regex: str = ask(
        "", "Adapt the linear layers whose names this matches, instead of lora_targets."
    )
    resolution: str = ask("", "Pictures are scaled to the area of squares of these sides in pixels, as 512,768,1024.")
    crop: str = ask("bucket", "How pictures are cropped.", choices=("bucket", "center", "random", "salience"))
    horizontal_flip: bool = ask(False, "Also train on mirrored pictures.")
    batch_size: int = ask(1, "Pictures per batch.", ge=1, le=16)
    gradient_accumulation_steps: int = ask(1, "Batches per step.", ge=1, le=64)
    optimizer: str = ask("adamw", "Optimizer.",
                         choices=("adamw", "adamw8bit", "prodigy", "lion", "adafactor"))  # fmt: skip
    lr_scheduler: str = ask("constant", "Learning rate schedule.", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = ask(0, "Steps over which the learning rate rises.", ge=0, le=10000)
    weight_decay: float = ask(1e-4, "Weight decay.", ge=0, le=1)
    max_grad_norm: float = ask(1.0, "Gradients are clipped to this norm. 0: no clipping.", ge=0, le=1000)
    caption_dropout_rate: float = ask(0.0, "Share of examples trained without a caption.", ge=0, le=1)
    mask_mode: str = ask("none", "Masks that restrict learning to a part of the pictures.",
                         choices=("none", "provided", "clipseg"))  # fmt: skip
    mask_prompt: str = ask("", "What clipseg looks for. Default: class_word.")
    mask_min_weight: float = ask(0.1, "Loss weight outside of a mask; inside it is 1.", ge=0, le=1)
    prior_preservation: str = ask("none", "How the base is kept from forgetting the class.",
                                  choices=("none", "output", "class_images"))  # fmt: skip
    class_prompt: str = ask(
        "", "Prompt of the class to preserve. Default: a {class_word}; with output, captions with it for the trigger."
    )
    num_class_images: int = ask(100, "Pictures of the class that the base makes before training.", ge=1, le=1000)
    prior_loss_weight: float = ask(1.0, "Weight of the loss that preserves the class.", ge=0, le=100)
    timestep_sampling: str = ask("auto", "Distribution of noise levels. auto: uniform on SDXL, logit_normal on FLUX.1.",
                                 choices=("auto", "uniform", "logit_normal", "shift", "content", "style"))  # fmt: skip
    snr_gamma: float | None = ask(
        None, "Gamma of min-SNR weighting; its authors use 5. Default: none.", ge=1e-3, le=100
    )
    noise_offset: float = ask(0.0, "Strength of extra noise that is constant within a channel.", ge=0, le=1)
    ema_decay: float = ask(
        0.0, "Decay of a moving average of the LoRA (EMA), which is then the result. 0: none.", ge=0, le=0.9999
    )
    precision: str = ask("auto", "Precision of the base's weights.", choices=("auto", "bf16", "fp32", "int8", "nf4"))
    gradient_checkpointing: str = ask("auto", "Recompute activations to save memory.", choices=("auto", "on", "off"))
    compile: str = ask("auto", "Compile the denoiser's blocks.", choices=("auto", "on", "off"))
    seed: int = ask(random_seed, "The same seed and pictures give the same LoRA.", ge=0, le=MAX_SEED)
    sample_prompts: str = ask("", "Prompts of the sample images, one per line. Default: four of our own.")
    sample_interval: int = ask(0, "Steps between sample images. 0: only at the end.", ge=0, le=10000)
    sample_steps: int = ask(28, "Denoising steps of a sample image. 0: no samples.", ge=0, le=100)
    checkpoint_interval: int = ask(0, "Steps between checkpoints. 0: none.", ge=0, le=10000)
    keep_checkpoints: int = ask(2, "How many of the latest checkpoints are kept.", ge=1, le=100)

    def __post_init__(self) -> None:
        check(self)
        for name, value in stripped(vars(self)).items():
            object.__setattr__(self, name, value)
        for side in self.sides or ():
            if not 64 <= side <= 2048:
                raise RequestError(f"resolution names {side}. Expected sides from 64 to 2048 pixels.")
        try:
            re.compile(self.layers_to_optimize_regex)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise RequestError(f"layers_to_optimize_regex is no regular expression: {error}. Expected one.") from error
        if not re.search(whole_word(self.trigger), self.prompt):
            seen = f"instance_prompt is {self.instance_prompt!r}, without the trigger word {self.trigger!r}"
            raise RequestError(f"{seen}. Expected [trigger] or that word in it.")
        if self.mask_mode == "clipseg" and not (self.mask_prompt or self.class_word):
            raise RequestError("mask_mode is clipseg but neither mask_prompt nor class_word is given. Give one.")
        if self.crop == "salience" and self.mask_mode == "none":
            raise RequestError("crop is salience but mask_mode is none. Expected provided or clipseg.")
        if self.prior_preservation != "none" and not (self.class_prompt or self.class_word):
            raise RequestError("prior_preservation needs class_prompt or class_word, and neither is given. Give one.")

    @property
    def sides(self) -> tuple[int, ...] | None:
        """The sides that resolution names, in pixels; None where it is blank."""
        try:
            return tuple(int(side) for side in self.resolution.split(",")) if self.resolution else None
        except ValueError as error:
            raise RequestError(
                f"resolution is {self.resolution!r}. Expected sides in pixels, as 512,768,1024."
            ) from error

    @property
    def trigger(self) -> str:
        """The trigger word: the given one, else the default for the lora_type."""
        return self.trigger_word or TRIGGERS[self.lora_type]

    @property
    def prompt(self) -> str:
        """The prompt of a picture without a caption."""
        return self.instance_prompt.replace("[trigger]", self.trigger) or self._filled(TEMPLATES[self.lora_type])

    @property
    def prior_prompt(self) -> str:
        """The prompt with which the base draws pictures of the class."""
        return self.class_prompt or f"a {self.class_word}"

    def rate(self, usual: float) -> float:
        """The learning rate; usual: the base's. Prodigy finds one itself and multiplies it with this, 1 by default."""
        return self.learning_rate or (1.0 if self.optimizer == "prodigy" else usual)

    def kept_caption(self, caption: str) -> str:
        """The caption under which the output is to stay the base's: class_prompt or, if blank, this caption with
        class_word for the trigger word and without "in [trigger] style"."""
        trigger = whole_word(self.trigger)
        style, subject = rf"[Ii]n {trigger} style(?!\w)", rf"{trigger}(\s+{re.escape(self.class_word)}(?!\w))?"
        styled = rf"^{style},?\s*|,?\s+{style}"
        # By a function, because in a template a backslash would be an escape.
        return self.class_prompt or re.sub(subject, lambda match: self.class_word, re.sub(styled, "", caption))

    @property
    def samples(self) -> tuple[str, ...]:
        """The prompts of the sample images: the given ones, else those of SCENES for the lora_type."""
        prompts = (line.strip().replace("[trigger]", self.trigger) for line in self.sample_prompts.splitlines())
        return tuple(filter(None, prompts)) or tuple(self._filled(scene) for scene in SCENES[self.lora_type])

    @property
    def remarks(self) -> list[str]:
        """A sentence for each setting that, with the others as they are, has no effect or not the one that is meant."""
        remarks = ineffective(self, NO_EFFECT)
        if self.lr_warmup_steps >= self.steps:  # the first step's rate is 0, so that the last is a step short
            seen = f"lr_warmup_steps is {self.lr_warmup_steps} and steps {self.steps}"
            remarks.append(f"{seen}: the learning rate is still rising at the end, and never what was asked for")
        if self.optimizer == "prodigy" and self.rate(1.0) <= STUCK_PRODIGY_RATE:
            seen = f"learning_rate is {self.learning_rate:g} and optimizer prodigy"
            remarks.append(f"{seen}, whose own rate hardly grows then, so that little or nothing is learnt: 1 is usual")
        return remarks

    def targets(self, names: Collection[str], component: str = "transformer") -> list[str]:
        """The layers to adapt. names: of a denoiser's linear layers; component: diffusers' name of the denoiser, with
        which an expression may begin, as flux-fine-tuner's do. Raises RequestError when it matches none."""
        pattern = self.layers_to_optimize_regex or TARGETS[self.lora_targets]
        for prefix in ("", f"{component}."):
            if chosen := [name for name in names if re.search(pattern, prefix + name)]:
                return chosen
        raise RequestError(
            f"layers_to_optimize_regex {pattern!r} names no linear layer of the base. "
            f"Expected one such as {next(iter(names))}."
        )

    def _filled(self, template: str) -> str:
        return template.format(trigger=self.trigger, word=self.class_word or WORDS[self.lora_type])


def ineffective(settings: Any, no_effect: Mapping[str, tuple[str, tuple[Any, ...]]]) -> list[str]:
    """A sentence for each setting that is not at its default and has no effect. settings: an instance of a dataclass;
    no_effect: as NO_EFFECT."""
    default = {item.name: item.default for item in fields(settings)}
    return [
        f"{name} changes nothing: {other} is {getattr(settings, other)!r}"
        for name, (other, off) in no_effect.items()
        if getattr(settings, name) != default[name] and getattr(settings, other) in off
    ]


def stripped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A TrainConfig's fields, the STRIPPED ones without spaces around them: spaces alone count as not given."""
    bare = {name: value.strip() for name, value in settings.items() if name in STRIPPED and isinstance(value, str)}
    return {**settings, **bare}


def whole_word(word: str) -> str:
    """A regular expression that finds a word where it is no part of a longer one."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"
