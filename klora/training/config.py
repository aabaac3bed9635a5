"""What a training run is told: the form's fields, their bounds, and what is left to the base or the LoRA's purpose."""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from klora.errors import RequestError

TRIGGERS = {"subject": "sbu", "style": "szn"}  # the published recipe's words
TEMPLATES = {"subject": "a {trigger} {word}", "style": "a {word} in {trigger} style"}
WORDS = {"subject": "subject", "style": "picture"}

_ATTENTION = r"attn\d?\.(to_q|to_k|to_v|to_out\.0)$"
TARGETS = {
    "attention": _ATTENTION,
    "attention_qkv": r"attn\d?\.(to_q|to_k|to_v)$",
    "attention_mlp": rf"{_ATTENTION}|(ff|ff_context)\.net\.\d|proj_mlp$|transformer_blocks\.\d+\.proj_out$",
    "all": r"transformer_blocks\.\d+\.",
}
"""Which linear layers to adapt, by a search in their names; on SDXL "attention" is 560 of them, on FLUX.1 190, where
"all" is 494."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run, checked on creation. None means what the published recipe, or the base, calls for.

    learning_rate: 5e-5 on SDXL, 1e-4 on FLUX.1.  lora_rank: 8 and 16; alpha is the rank.  resolutions: sides in pixels
    of the squares whose areas the pictures are scaled to, None is the base's own.  Raises RequestError.
    """

    lora_type: Literal["subject", "style"] = "subject"
    trigger_word: str = ""
    class_word: str = ""
    instance_prompt: str = ""
    steps: int = 1000
    learning_rate: float | None = None
    lora_rank: int | None = None
    lora_targets: str = "attention"
    layers_to_optimize_regex: str = ""
    resolutions: tuple[int, ...] | None = None
    crop: Literal["bucket", "center", "random"] = "bucket"
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    caption_dropout_rate: float = 0.0
    seed: int = field(default_factory=lambda: secrets.randbelow(1 << 31))
    checkpoint_interval: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} is {value}. Expected {low} to {high}.")
        for side in self.resolutions or ():
            if not 64 <= side <= 2048:
                raise RequestError(f"resolution names {side}. Expected sides from 64 to 2048 pixels.")
        if self.lr_scheduler not in ("constant", "linear", "cosine"):
            raise RequestError(f"lr_scheduler is {self.lr_scheduler!r}. Expected constant, linear or cosine.")
        if self.lora_type not in TRIGGERS:
            raise RequestError(f"lora_type is {self.lora_type!r}. Expected subject or style.")
        if self.lora_targets not in TARGETS:
            raise RequestError(f"lora_targets is {self.lora_targets!r}. Expected one of {', '.join(TARGETS)}.")
        try:
            re.compile(self.layers_to_optimize_regex)
        except re.error as error:
            raise RequestError(f"layers_to_optimize_regex is no regular expression: {error}. Expected one.") from error

    @property
    def trigger(self) -> str:
        """The word that stands for what is learnt."""
        return self.trigger_word or TRIGGERS[self.lora_type]

    @property
    def prompt(self) -> str:
        """What a picture without a caption is called."""
        word = self.class_word or WORDS[self.lora_type]
        return self.instance_prompt or TEMPLATES[self.lora_type].format(trigger=self.trigger, word=word)

    def targets(self, names: Iterable[str]) -> list[str]:
        """Those of a denoiser's linear layers that are to be adapted. Raises RequestError when none is."""
        pattern = self.layers_to_optimize_regex or TARGETS[self.lora_targets]
        chosen = [name for name in names if re.search(pattern, name)]
        if not chosen:
            raise RequestError(f"layers_to_optimize_regex {pattern!r} names no linear layer of the base. Expected one.")
        return chosen


_BOUNDS = (
    ("steps", 1, 10000),
    ("learning_rate", 1e-8, 10),
    ("lora_rank", 1, 128),
    ("batch_size", 1, 16),
    ("gradient_accumulation_steps", 1, 64),
    ("lr_warmup_steps", 0, 10000),
    ("weight_decay", 0, 1),
    ("max_grad_norm", 0, 1000),
    ("caption_dropout_rate", 0, 1),
    ("seed", 0, 4294967295),
    ("checkpoint_interval", 0, 10000),
)
