"""What files are called that make up a LoRA, on a disk, in a tar or at a hub: by their names alone."""

import re
from collections.abc import Collection

WITHOUT_NAME = "pytorch_lora_weights.safetensors"  # as diffusers' trainers call every LoRA
PEFT, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # where this states the alphas of that
LORAS = (WITHOUT_NAME, "lora.safetensors", PEFT)  # the surest first
WORDS = "_emb.safetensors"  # after a LoRA's name, as diffusers' advanced trainers write what it teaches
# Beside that, what ai-toolkit and kohya save on the way to a file: dog_000000250, dog-000010, dog-step00000500.
_BESIDE = re.compile(r"(.+)(?:[-_](?:step)?\d{6,}|_emb)\.safetensors")


def lora_among(names: Collection[str]) -> str | None:
    """Which of the .safetensors files of a folder is the LoRA: one that goes by such a name, or the one to which all
    others belong; None where that is not so."""
    if known := [name for name in LORAS if name in names]:
        return known[0]
    if len(names) == 1:
        return next(iter(names))
    finals = {f"{match[1]}.safetensors" if (match := _BESIDE.fullmatch(name)) else name for name in names}
    return finals.pop() if len(finals) == 1 and finals <= {*names} else None
