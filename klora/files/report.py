"""What is said of a LoRA file, by `klora inspect` and in a server's log."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klora.files.container import Contents, opened
from klora.files.factors import Module
from klora.files.names import component
from klora.lora import LoRA

_FORMATS = {  # {pattern of a key: format}; the first pattern counts that some key has
    r"^base_model\.": "PEFT", r"\.processor\.(qkv|proj)_lora": "XLabs", r"^lora_transformer": "OneTrainer",
    r"^lora_unet\.": "OneTrainer", r"^lycoris_": "LyCORIS", r"^lora_(unet|te\d?)_": "kohya",
    r"double_blocks\.|single_blocks\.|input_blocks\.|output_blocks\.": "ComfyUI",
    r"processor\.|\.lora\.(down|up)": "diffusers, legacy", r"\.lora_[AB]\.": "diffusers",
}  # fmt: skip
ENCODERS = ("text_encoder", "text_encoder_2")
MAX_TRIGGER = 200  # characters
_NOTHING = ("None", "null")  # as trainers write a setting that is not set
_STATED = ("trigger", "modelspec.trigger_phrase", "ss_trigger", "instance_prompt")  # as trainers write it
_ONLY = re.compile(r'\{"\d+_([^"\\]+)": \{"\1": \d+\}\}')  # as ai-toolkit writes it: pictures called by their only tag
_TAGS = 5  # of the most frequent ones in a file's training captions


@dataclass(frozen=True)
class FileReport:
    """A LoRA file as a base reads it. None of its tensors was dropped that would act: such a file is refused.

    kinds: {kind: number of modules}.   ranks: lowest and highest.   layers: number of the denoiser's.   text_encoders:
    {component: number of layers}.   words: that it teaches.   inexact: the largest error of a converted module,
    relative to its dW.   triggers: words that the metadata states; the first is added to prompts.   tags: other words
    that were frequent in the training captions; never added.
    """

    format: str
    kinds: Mapping[str, int]
    ranks: tuple[int, int]
    layers: int
    text_encoders: Mapping[str, int]
    words: tuple[str, ...]
    inexact: float
    triggers: tuple[str, ...]
    tags: tuple[str, ...]

    def __str__(self) -> str:
        """In one line."""
        low, high = self.ranks
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        facts = [f"{self.format}: {kinds}", f"rank {low}" if low == high else f"ranks {low} to {high}"]
        facts += [f"{self.layers} layers, none dropped"]
        facts += [f"{count} of {component}" for component, count in self.text_encoders.items()]
        facts += [f"teaches {word!r}" for word in self.words]
        facts += [f"converted to within {self.inexact:.1e}"] if self.inexact else []
        return ", ".join(facts + [f"trigger {trigger!r}" for trigger in self.triggers[:1]])


def file_report(contents: Contents, file_modules: Mapping[str, Module], lora: LoRA, inexact: float) -> FileReport:
    """The report on an open file, its modules() and the LoRA that a base has read from it."""
    ranks = [pair.rank for part in (lora.layers, *lora.text_encoders.values()) for pair in part.values()]
    triggers = stated_triggers(contents.metadata)
    return FileReport(
        format=_format(contents),
        kinds=Counter(module.kind for module in file_modules.values()),
        ranks=(min(ranks), max(ranks)),
        layers=len(lora),
        text_encoders={component: len(layers) for component, layers in lora.text_encoders.items()},
        words=tuple(lora.words),
        inexact=inexact,
        triggers=triggers,
        tags=tuple(tag for tag in tags(contents.metadata) if tag not in triggers),
    )


def stated_triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words or phrases that a file's metadata states as its trigger, the surest first."""
    only = _ONLY.findall(metadata.get("ss_tag_frequency", ""))
    words = (word.strip(" ,") for word in (*(metadata.get(key, "") for key in _STATED), *only))
    return tuple(dict.fromkeys(filter(_is_trigger, words)))


def _is_trigger(word: str) -> bool:
    """Whether a word is fit for a prompt and a line of a log."""
    return word.isprintable() and 0 < len(word) <= MAX_TRIGGER and word not in _NOTHING


def stated_alphas(path: Path) -> dict[float, int]:
    """{alpha: number of the denoiser's layers} by a file's alpha tensors; {} where it has none. Raises LoRAError."""
    with opened(path) as contents:
        stems = [key.removesuffix(".alpha") for key in contents.specs if key.endswith(".alpha")]
        denoiser = [stem for stem in stems if component(stem, ["unet", *ENCODERS])[0] == "unet"]
        return dict(sorted(Counter(float(contents.tensor(f"{stem}.alpha")) for stem in denoiser).items()))


def tags(metadata: Mapping[str, str]) -> list[str]:
    """The most frequent tags of the training captions, by kohya's ss_tag_frequency: {"10_folder": {"tag": count}}."""
    try:
        folders = dict(json.loads(metadata.get("ss_tag_frequency") or "{}")).values()
        counts: Counter[str] = Counter()
        for folder in folders:
            counts.update({str(tag).strip()[:100]: int(count) for tag, count in dict(folder).items()})
    except (ValueError, TypeError, OverflowError, RecursionError):  # what nobody needs is no reason to refuse a file
        return []
    return [tag for tag, _ in counts.most_common(_TAGS) if _is_trigger(tag)]


def _format(contents: Contents) -> str:
    forms = (form for mark, form in _FORMATS.items() if any(re.search(mark, key) for key in contents.specs))
    return next(forms, "bare names")
