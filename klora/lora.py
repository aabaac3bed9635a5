"""LoRA files <-> {module name: LowRank}. Every common spelling in, one spelling out.

Knows nothing of fusion, of pipelines or of downloads. A file is matched against an inventory, the base model's own
linear layers and their shapes, so no layer is ever listed by hand.

Shape suffixes: O output features, I input features, R rank.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError

MAX_ALPHA = 1e4

Inventory = Mapping[str, Mapping[str, tuple[int, int]]]
"""{component: {module name: (O, I)}}, the denoiser first, its modules in execution order."""

Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Turns kohya-spelled tensors under foreign module names (sgm, BFL) into diffusers-spelled ones."""

_FACTOR = re.compile(r"^(.+?)(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight$")
_WRAPPERS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_UNSUPPORTED = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "Tucker LoCon",
    "oft_": "OFT", "boft_": "OFT", "bundle_emb": "a bundled embedding", ".diff": "a full weight difference",
    "w_norm": "a norm difference", "b_norm": "a norm difference",
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """One layer's update dW = B A, with alpha/rank already folded into B.  A [R, I], B [O, R], same device."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """dW [O, I] in float32."""
        return self.B.float() @ self.A.float()


@dataclass(frozen=True)
class LoRA(Mapping[str, LowRank]):
    """A LoRA file as data: a mapping of the denoiser's layers, and what else came with them.

    layers: {module name: LowRank} in execution order.  text_encoders: {component: {module name: LowRank}}.
    metadata: the file's own strings; never executed, never passed to a constructor.
    """

    layers: Mapping[str, LowRank]
    text_encoders: Mapping[str, Mapping[str, LowRank]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LowRank:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Plan:
    """Which LoRA acts where, when and how strongly.  gates: float [steps, layers, LoRAs]; one step means always."""

    layers: tuple[str, ...]
    loras: tuple[Mapping[str, LowRank], ...]
    gates: Tensor

    @classmethod
    def constant(cls, loras: tuple[Mapping[str, LowRank], ...], scales: tuple[float, ...]) -> "Plan":
        """Every LoRA acts at every step at its own scale: one LoRA alone, or a weighted sum."""
        layers = tuple(dict.fromkeys(name for lora in loras for name in lora))
        return cls(layers, loras, torch.tensor(scales).expand(1, len(layers), len(scales)))


def read_keys(path: Path) -> list[str]:
    """The tensor names in a safetensors file; only its header is read. Raises LoRAError."""
    with _opened(path) as file:
        return list(file.keys())


def read_lora(path: Path, inventory: Inventory, rename: Rename) -> LoRA:
    """Read a diffusers, PEFT, legacy diffusers or kohya file for the base that the inventory describes.

    Raises LoRAError: not a safetensors file, not a plain LoRA, or not of this base.
    """
    with _opened(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        found = _located(_paired(tensors), inventory, rename)
    ordered = {part: {n: found[part, n] for n in names if (part, n) in found} for part, names in inventory.items()}
    denoiser = next(iter(inventory))
    return LoRA(ordered.pop(denoiser), {part: layers for part, layers in ordered.items() if layers}, metadata)


def save_lora(path: Path, lora: LoRA, component: str, dtype: torch.dtype | None = None) -> Path:
    """Write a diffusers-format file that needs no alpha: `<component>.<module>.lora_A.weight` and `.lora_B.weight`.

    component: what diffusers calls the denoiser, "unet" or "transformer".  dtype: None keeps each tensor's own.
    """
    tensors = {}
    for prefix, layers in {component: lora.layers, **lora.text_encoders}.items():
        for name, pair in layers.items():
            tensors[f"{prefix}.{name}.lora_A.weight"] = pair.A.to("cpu", dtype).contiguous()
            tensors[f"{prefix}.{name}.lora_B.weight"] = pair.B.to("cpu", dtype).contiguous()
    save_file(tensors, path, metadata=dict(lora.metadata) or None)
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:  # Any: safetensors types its reader nowhere
    """The file, open; what is wrong with it is said with its name."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except LoRAError as error:
        raise LoRAError(f"{path.name} {error}") from error
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{path.name} cannot be read ({error}). Expected a LoRA in a .safetensors file.") from error


def _paired(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """{module name as spelled: LowRank}, alpha/rank folded into B. Every tensor is used, or refused by name."""
    factors: dict[str, dict[str, Tensor]] = {}
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    for key, tensor in tensors.items():
        if match := _FACTOR.match(key):
            part = {"down": "A", "up": "B"}.get(match[2], match[2])
            # One-byte floats hold values but can compute nothing.
            factors.setdefault(match[1], {})[part] = tensor.bfloat16() if tensor.itemsize == 1 else tensor
        elif not key.endswith(".alpha"):
            kind = next((kind for mark, kind in _UNSUPPORTED.items() if mark in key), "no LoRA factor")
            raise LoRAError(f"holds {key!r}, which is {kind}. Expected plain LoRA factors (lora_A and lora_B).")
    if orphans := alphas.keys() - factors.keys():
        raise LoRAError(f"has an alpha but no factors for {min(orphans)!r}. Expected both; the file is damaged.")
    return {stem: _pair(stem, pair, alphas.get(stem)) for stem, pair in factors.items()}


def _pair(stem: str, factors: Mapping[str, Tensor], alpha: Tensor | None) -> LowRank:
    if factors.keys() != {"A", "B"}:
        raise LoRAError(f"has only lora_{min(factors)} for {stem!r}. Expected lora_A and lora_B; the file is damaged.")
    A, B = factors["A"], factors["B"]
    if A.ndim != 2 or B.ndim != 2:
        raise LoRAError(f"adapts the convolution {stem!r}. Expected linear layers only.")
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise LoRAError(f"has ranks {A.shape[0]} and {B.shape[1]} for {stem!r}. Expected the same rank in A and B.")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise LoRAError(f"has values for {stem!r} that are not finite. Expected numbers; the file is damaged.")
    if alpha is None:
        return LowRank(A, B)
    value = float(alpha) if alpha.numel() == 1 else math.nan
    if not 0 < value <= MAX_ALPHA:
        raise LoRAError(f"has alpha {value} for {stem!r}. Expected one number in (0, {MAX_ALPHA:g}].")
    return LowRank(A, B if value == A.shape[0] else B.float() * (value / A.shape[0]))


def _located(pairs: Mapping[str, LowRank], inventory: Inventory, rename: Rename) -> dict[tuple[str, str], LowRank]:
    """{(component, module name): pair}, every pair with a place in the base and of that place's shape."""
    found, foreign = _matched(pairs, inventory)
    if foreign:
        renamed, unknown = _matched(_paired(_renamed(foreign, rename)), inventory)
        found |= renamed
        if unknown:
            raise _not_of_this_base(unknown, inventory)
    for (part, name), pair in found.items():
        seen, expected = (pair.B.shape[0], pair.A.shape[1]), inventory[part][name]
        if seen != expected:
            raise LoRAError(f"was made for another base: {name!r} is {seen} there. Expected {expected}.")
    return found


def _matched(
    pairs: Mapping[str, LowRank], inventory: Inventory
) -> tuple[dict[tuple[str, str], LowRank], dict[str, LowRank]]:
    """Split pairs into ({(component, module name): pair}, those whose spelling the inventory does not know)."""
    lookups = {part: _lookup(names) for part, names in inventory.items()}
    found: dict[tuple[str, str], LowRank] = {}
    foreign = {}
    for stem, pair in pairs.items():
        part, spelled = _component(stem, list(inventory))
        name = lookups[part].get(spelled)
        if (part, name) in found:
            raise LoRAError(f"adapts {name!r} twice, once as {stem!r}. Expected one pair of factors a layer.")
        if name is None:
            foreign[stem] = pair
        else:
            found[part, name] = pair
    return found, foreign


def _lookup(names: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    # transformers moves CLIP's layers in and out of "text_model" between versions and classes; files always say it.
    bare = {name.removeprefix("text_model."): name for name in names}
    return bare | {spelled.replace(".", "_"): name for spelled, name in bare.items()}


def _component(stem: str, components: list[str]) -> tuple[str, str]:
    """(component, module name as spelled) of a key's stem, its wrappers taken off."""
    denoiser, *encoders = components
    for number, encoder in enumerate(encoders, start=1):
        if match := re.match(rf"({encoder}\.|lora_te{number}_)(text_model[._])?", stem):
            return encoder, stem[match.end() :]
    while prefix := next((wrapper for wrapper in _WRAPPERS if stem.startswith(wrapper)), ""):
        stem = stem.removeprefix(prefix)
    stem = re.sub(r"^(lora_unet|lora_transformer|lycoris)_", "", stem).replace(".processor.", ".")
    return denoiser, re.sub(r"([._])to_out$", r"\1to_out\g<1>0", stem)


def _renamed(foreign: Mapping[str, LowRank], rename: Rename) -> dict[str, Tensor]:
    spelled = {f"{stem}.lora_down.weight": pair.A for stem, pair in foreign.items()}
    spelled |= {f"{stem}.lora_up.weight": pair.B for stem, pair in foreign.items()}
    try:
        return rename(spelled)
    except Exception as error:  # converters raise KeyError, ValueError, RuntimeError, AssertionError ... for one cause
        raise _not_of_this_base(foreign, {}) from error


def _not_of_this_base(unknown: Mapping[str, LowRank], inventory: Inventory) -> LoRAError:
    denoiser = next(iter(inventory), "denoiser")
    return LoRAError(f"adapts {min(unknown)!r}, which this base does not have. Expected layers of its {denoiser}.")
