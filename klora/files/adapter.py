"""The alphas that diffusers and PEFT state outside the tensors, in a header's metadata or in adapter_config.json: read
as plain numbers and names, of which nothing is executed or handed to a constructor."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from klora.errors import LoRAError
from klora.files.container import Contents
from klora.files.factors import scaled
from klora.files.names import LayerKey
from klora.lora import LowRank

_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # {peft_type: its key for alpha}
# Initialisations that change the base's own weights: the pairs are right for that other base alone.
_MOVED = re.compile(r"pissa|olora|loftq|corda|lora_ga", re.IGNORECASE)


def with_alphas(pairs: Mapping[LayerKey, LowRank], contents: Contents) -> dict[LayerKey, LowRank]:
    """The pairs with alpha/rank folded into B, as a header's lora_adapter_metadata, {"unet.lora_alpha": ...}, states
    it, or a PEFT repository's adapter_config.json, {"lora_alpha": ...}; unchanged without either. Raises LoRAError."""
    header, beside = contents.metadata.get("lora_adapter_metadata", "{}"), contents.adapter
    in_tensors = any(key.endswith(".alpha") for key in contents.specs)
    if sum((in_tensors, "lora_alpha" in header, not beside.keys().isdisjoint(_ALPHA.values()))) > 1:
        raise LoRAError("states alpha in its tensors and in its metadata. Expected one of the two.")
    try:
        metadata = dict(json.loads(header))
        configs = {part: _checked(_of_part(metadata, part) | dict(beside)) for part in {part for part, _ in pairs}}
        return {(part, name): _scaled(name, pair, configs[part]) for (part, name), pair in pairs.items()}
    except LoRAError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise LoRAError(
            f"has adapter metadata that cannot be read ({error}). Expected numbers for alpha and rank."
        ) from error


def _of_part(metadata: Mapping[str, Any], part: str) -> dict[str, Any]:
    """One component's config: what the metadata has under its prefix."""
    return {key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")}


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """The config itself. Raises LoRAError unless the pairs are all that it takes to apply the adapter."""
    if (kind := _kind(config)) not in _ALPHA:
        raise LoRAError(f"is PEFT's {kind[:40]}. Expected {', '.join(_ALPHA)}.")
    if config.get("use_dora"):
        raise LoRAError("has use_dora in its adapter metadata. Expected LoRA without magnitudes.")
    if _MOVED.search(initialisation := str(config.get("init_lora_weights"))):
        raise LoRAError(
            f"has init_lora_weights {initialisation[:40]!r}, which changes the base's weights. Expected pairs for the "
            "base as it was published."
        )
    return config


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type") or "LORA")


def _scaled(name: str, pair: LowRank, config: Mapping[str, Any]) -> LowRank:
    kind = _kind(config)
    alpha = _of_layer(name, config, _ALPHA[kind], "alpha_pattern")
    if alpha is None:
        return pair
    if kind == "LORA":
        return scaled(name, pair, float(alpha), math.sqrt(pair.rank) if config.get("use_rslora") else pair.rank)
    # PEFT divides by the rank that it was given, which is not the pair's, also where no factor is thin.
    if (rank := int(_of_layer(name, config, "r", "rank_pattern"))) < 1:
        raise ValueError(f"r {rank}")
    return scaled(name, pair, float(alpha), rank)


def _of_layer(name: str, config: Mapping[str, Any], key: str, patterns: str) -> Any:
    """A config's value for one layer: that of the first pattern which the layer matches, else the one under key, else
    None. patterns: the key of {pattern: value}."""
    special = config.get(patterns) or {}
    # PEFT's patterns may be any regular expression; names, at most anchored, are what trainers write and all we read.
    if odd := [pattern for pattern in special if not re.fullmatch(r"\^?[\w.]+\$?", pattern)]:
        raise LoRAError(f"has {odd[0][:80]!r} in its {patterns}. Expected names of layers, at most with ^ and $.")
    return next((own for pattern, own in special.items() if re.match(rf"(.*\.)?({pattern})$", name)), config.get(key))
