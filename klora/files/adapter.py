"""What diffusers and PEFT say of alpha beside the tensors, read as plain numbers and names; nothing of it is executed
or handed to a constructor."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from klora.errors import LoRAError
from klora.files.container import Contents
from klora.files.factors import scaled
from klora.files.names import Place
from klora.lora import LowRank

# Initialisations that change the base's own weights: the pairs are right for that other base alone.
_MOVED = re.compile(r"pissa|olora|loftq|corda|lora_ga", re.IGNORECASE)


def with_alphas(found: Mapping[Place, LowRank], contents: Contents) -> dict[Place, LowRank]:
    """Fold in the alphas of a header's lora_adapter_metadata, {"unet.lora_alpha": ...}, or of a PEFT repository's
    adapter_config.json, {"lora_alpha": ...}. Raises LoRAError."""
    header, beside = contents.metadata.get("lora_adapter_metadata", "{}"), contents.adapter
    in_tensors = any(key.endswith(".alpha") for key in contents.specs)
    if sum((in_tensors, "lora_alpha" in header, "lora_alpha" in beside)) > 1:
        raise LoRAError("states alpha in its tensors and in its metadata. Expected one of the two.")
    try:
        config = dict(json.loads(header))
        config |= {f"{part}.{key}": value for part in {part for part, _ in found} for key, value in beside.items()}
        return {(part, name): _scaled(part, name, pair, config) for (part, name), pair in found.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LoRAError(
            f"has adapter metadata that cannot be read ({error}). Expected lora_alpha as a number."
        ) from error


def _scaled(part: str, name: str, pair: LowRank, config: Mapping[str, Any]) -> LowRank:
    special = config.get(f"{part}.alpha_pattern") or {}
    # PEFT's patterns may be any regular expression; names, at most anchored, are what trainers write and all we read.
    if odd := [pattern for pattern in special if not re.fullmatch(r"\^?[\w.]+\$?", pattern)]:
        raise ValueError(f"alpha_pattern {odd[0]!r}")
    if config.get(f"{part}.use_dora"):
        raise ValueError("use_dora, which is no plain LoRA")
    if _MOVED.search(str(config.get(f"{part}.init_lora_weights"))):
        raise ValueError(f"init_lora_weights {config[f'{part}.init_lora_weights']}, which changes the base's weights")
    alpha = next((value for pattern, value in special.items() if re.match(rf"(.*\.)?({pattern})$", name)), None)
    alpha = config.get(f"{part}.lora_alpha") if alpha is None else alpha
    if alpha is None:
        return pair
    return scaled(name, pair, float(alpha), math.sqrt(pair.rank) if config.get(f"{part}.use_rslora") else pair.rank)
