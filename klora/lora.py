"""LoRA files <-> {module name: LowRank}. Every common spelling in, one spelling out.

Knows nothing of fusion, of pipelines or of downloads. A file is matched against an inventory, the base model's own
linear layers and their shapes, so no layer is ever listed by hand.   O outputs, I inputs, R rank.
"""

import json
import math
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError

MAX_ALPHA = 1e4
MAX_BYTES = 2 << 30

# {component: {module name: (O, I)}}, the denoiser first, its modules in execution order
Inventory = Mapping[str, Mapping[str, tuple[int, int]]]
Place = tuple[str, str]  # (component, module name)
# Turns kohya-spelled tensors under foreign module names (sgm, BFL) into diffusers-spelled ones
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]

_FACTOR = re.compile(r"^(.+?)(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight$")
_UNKNOWN = "adapts {!r}, which this base does not have. Expected layers of the base that this request runs."
_WRAPPERS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_UNSUPPORTED = {
    r"dora_scale|lora_magnitude_vector": "DoRA", r"hada_": "LoHa", r"lokr_": "LoKr", r"lora_mid": "a Tucker LoCon",
    r"oft_": "OFT", r"bundle_emb": "a bundled embedding", r"\.diff(_b)?$": "a full weight difference",
    r"[wb]_norm$": "a norm difference",
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """One layer's update dW = B A, with alpha/rank already folded into B.  A [R, I], B [O, R], same device."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class LoRA(Mapping[str, LowRank]):
    """A LoRA file as data: a mapping of the denoiser's layers, in execution order, and what else came with them.
    text_encoders: {component: {module name: LowRank}}; metadata: the file's own strings, never executed."""

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
        return cls(layers, loras, torch.tensor(scales, dtype=torch.float32).expand(1, len(layers), len(scales)))


def read_keys(path: Path) -> list[str]:
    """The tensor names in a safetensors file; only its header is read. Raises LoRAError."""
    with _opened(path) as file:
        return list(file.keys())


def read_lora(path: Path, inventory: Inventory, rename: Rename) -> LoRA:
    """Read a diffusers, PEFT, legacy diffusers or kohya file for the base that the inventory describes, or raise
    LoRAError: not a safetensors file, not a plain LoRA, or not of this base."""
    with _opened(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        found = _located(_paired(tensors), inventory, rename)
        adapter = metadata.pop("lora_adapter_metadata", "{}")
        if "lora_alpha" in adapter and any(key.endswith(".alpha") for key in tensors):
            raise LoRAError("states alpha in its tensors and in its metadata. Expected one of the two.")
        found = _with_metadata_alphas(found, adapter)
    ordered = {part: {n: found[part, n] for n in names if (part, n) in found} for part, names in inventory.items()}
    denoiser = next(iter(inventory))
    return LoRA(ordered.pop(denoiser), {part: layers for part, layers in ordered.items() if layers}, metadata)


def save_lora(path: Path, lora: LoRA, component: str, dtype: torch.dtype | None = None) -> Path:
    """Write a diffusers-format file that needs no alpha. component: what diffusers calls the denoiser, "unet" or
    "transformer"; dtype: None keeps each tensor's own."""
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
    path = Path(path)
    try:
        with _unpacked(path) as unpacked, safe_open(unpacked, framework="pt") as file:
            yield file
    except LoRAError as error:
        raise LoRAError(f"{path.name} {error}") from error
    except (SafetensorError, OSError, tarfile.TarError) as error:
        raise LoRAError(f"{path.name} cannot be read ({error}). Expected a LoRA in a .safetensors file.") from error


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file itself, or, of a tar that a trainer made, a copy of its lora.safetensors for as long as it is read."""
    if not path.is_file() or not tarfile.is_tarfile(path):
        yield path
        return
    with tarfile.open(path) as tar, tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        members = [member for member in tar if member.isfile() and Path(member.name).name == "lora.safetensors"]
        if len(members) != 1 or members[0].size > MAX_BYTES:
            raise LoRAError(
                f"is a tar with {len(members)} lora.safetensors. Expected one, of at most {MAX_BYTES} bytes."
            )
        shutil.copyfileobj(cast(IO[bytes], tar.extractfile(members[0])), copy)
        copy.flush()
        yield Path(copy.name)


def _paired(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """{module name as spelled: LowRank}, alpha/rank folded into B. Every tensor is used, or refused by name."""
    factors: dict[str, dict[str, Tensor]] = {}
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    for key, tensor in tensors.items():
        if match := _FACTOR.match(key):
            stem, part = match[1], {"down": "A", "up": "B"}.get(match[2], match[2])
            if part in factors.setdefault(stem, {}):
                raise LoRAError(f"holds lora_{part} of {stem!r} twice. Expected one adapter.")
            factors[stem][part] = tensor
        elif not key.endswith(".alpha"):
            kind = next((kind for mark, kind in _UNSUPPORTED.items() if re.search(mark, key)), "no LoRA factor")
            raise LoRAError(f"holds {key!r}, which is {kind}. Expected plain LoRA factors (lora_A and lora_B).")
    if orphans := alphas.keys() - factors.keys():
        raise LoRAError(f"has an alpha but no factors for {min(orphans)!r}. Expected both; the file is damaged.")
    if not factors:
        raise LoRAError("holds no tensors. Expected LoRA factors (lora_A and lora_B).")
    return {stem: _pair(stem, pair, alphas.get(stem)) for stem, pair in factors.items()}


def _pair(stem: str, factors: Mapping[str, Tensor], alpha: Tensor | None) -> LowRank:
    if factors.keys() != {"A", "B"}:
        raise LoRAError(f"has only lora_{min(factors)} for {stem!r}. Expected lora_A and lora_B; the file is damaged.")
    # One-byte floats hold values but can compute nothing.
    A, B = (factor.bfloat16() if factor.itemsize == 1 else factor for factor in (factors["A"], factors["B"]))
    if not (factors["A"].is_floating_point() and factors["B"].is_floating_point()):
        raise LoRAError(f"has {factors['A'].dtype} values for {stem!r}. Expected floating-point ones.")
    if A.ndim != 2 or B.ndim != 2:
        raise LoRAError(f"adapts the convolution {stem!r}. Expected linear layers only.")
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise LoRAError(f"has ranks {A.shape[0]} and {B.shape[1]} for {stem!r}. Expected the same rank in A and B.")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise LoRAError(f"has values for {stem!r} that are not finite. Expected numbers; the file is damaged.")
    if alpha is None:
        return LowRank(A, B)
    return _scaled(stem, LowRank(A, B), float(alpha) if alpha.numel() == 1 else math.nan, A.shape[0])


def _scaled(stem: str, pair: LowRank, alpha: float, divisor: float) -> LowRank:
    if not 0 < alpha <= MAX_ALPHA:
        raise LoRAError(f"has alpha {alpha} for {stem!r}. Expected one number in (0, {MAX_ALPHA:g}].")
    return pair if alpha == divisor else LowRank(pair.A, pair.B.float() * (alpha / divisor))


def _located(pairs: Mapping[str, LowRank], inventory: Inventory, rename: Rename) -> dict[Place, LowRank]:
    """Every pair with its place in the base, of that place's shape."""
    if len(pairs) > (most := sum(len(names) for names in inventory.values())):  # and converters are quadratic
        raise LoRAError(f"adapts {len(pairs)} layers. Expected at most the {most} that this base has.")
    lookups = {part: _lookup(names) for part, names in inventory.items()}
    found: dict[Place, LowRank] = {}
    foreign: dict[str, str] = {}
    for stem, pair in pairs.items():
        part, spelled = _component(stem, list(inventory))
        if name := lookups[part].get(spelled):
            _place(found, (part, name), pair, stem, inventory)
        elif part != next(iter(inventory)):
            raise LoRAError(_UNKNOWN.format(stem))
        else:
            kohya = f"lora_unet_{spelled.replace('.', '_')}"
            if kohya in foreign.values():
                raise LoRAError(f"adapts {spelled!r} twice, once as {stem!r}. Expected one pair of factors a layer.")
            foreign[stem] = kohya
    for stem, spelled, pair in _renamed(foreign, pairs, rename):
        part, spelled = _component(spelled, list(inventory))
        if (name := lookups[part].get(spelled)) is None:
            raise LoRAError(_UNKNOWN.format(stem))
        _place(found, (part, name), pair, stem, inventory)
    return found


def _place(found: dict[Place, LowRank], place: Place, pair: LowRank, stem: str, inventory: Inventory) -> None:
    seen, expected = (pair.B.shape[0], pair.A.shape[1]), inventory[place[0]][place[1]]
    if seen != expected:
        raise LoRAError(f"was made for another base: {stem!r} is {seen} there. Expected {expected}.")
    if place in found:
        raise LoRAError(f"adapts {place[1]!r} twice, once as {stem!r}. Expected one pair of factors a layer.")
    found[place] = pair


def _lookup(names: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    # transformers moves CLIP's layers in and out of "text_model" between versions and classes; files always say it.
    bare = {name.removeprefix("text_model."): name for name in names}
    return bare | {spelled.replace(".", "_"): name for spelled, name in bare.items()}


def _component(stem: str, components: list[str]) -> tuple[str, str]:
    """(component, module name as spelled) of a key's stem, its wrappers taken off."""
    denoiser, *encoders = components
    for encoder, kohya in zip(encoders, ("lora_te1?_", "lora_te[23]_"), strict=False):  # FLUX's T5 is te3
        if match := re.match(rf"({encoder}\.|{kohya})(text_model[._])?", stem):
            return encoder, stem[match.end() :]
    while prefix := next((wrapper for wrapper in _WRAPPERS if stem.startswith(wrapper)), ""):
        stem = stem.removeprefix(prefix)
    stem = re.sub(r"^(lora_unet|lora_transformer|lycoris)_", "", stem).replace(".processor.", ".")
    return denoiser, re.sub(r"([._])to_out$", r"\1to_out\g<1>0", stem)


def _renamed(
    foreign: Mapping[str, str], pairs: Mapping[str, LowRank], rename: Rename
) -> Iterator[tuple[str, str, LowRank]]:
    """(stem, new spelling, pair) of what a converter makes of {stem: kohya spelling}; one stem may become several.

    Converters drop names that they do not know. So each runs twice, once with every A filled with its stem's number.
    """
    stems = list(foreign)
    numbered = {stem: LowRank(torch.full(pairs[stem].A.shape, float(i)), pairs[stem].B) for i, stem in enumerate(stems)}
    numbers = {spelled: int(pair.A[0, 0]) for spelled, pair in _converted(foreign, numbered, rename).items()}
    if dropped := set(range(len(stems))) - set(numbers.values()):
        raise LoRAError(_UNKNOWN.format(stems[min(dropped)]))
    for spelled, pair in _converted(foreign, pairs, rename).items():
        yield stems[numbers[spelled]], spelled, pair


def _converted(foreign: Mapping[str, str], pairs: Mapping[str, LowRank], rename: Rename) -> dict[str, LowRank]:
    if not foreign:
        return {}
    tensors = {f"{kohya}.lora_down.weight": pairs[stem].A for stem, kohya in foreign.items()}
    tensors |= {f"{kohya}.lora_up.weight": pairs[stem].B for stem, kohya in foreign.items()}
    try:
        return _paired(rename(tensors))
    except Exception as error:  # converters raise KeyError, ValueError, RuntimeError, AssertionError ... for one cause
        for stem, kohya in foreign.items() if len(foreign) > 1 else ():
            _converted({stem: kohya}, pairs, rename)  # raises for the one that is to blame
        raise LoRAError(_UNKNOWN.format(min(foreign))) from error


def _with_metadata_alphas(found: Mapping[Place, LowRank], metadata: str) -> dict[Place, LowRank]:
    """Fold in the alphas that diffusers and PEFT write beside the tensors; read as plain numbers and names."""
    try:
        config = dict(json.loads(metadata))
        return {place: _with_metadata_alpha(*place, pair, config) for place, pair in found.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LoRAError(
            f"has adapter metadata that cannot be read ({error}). Expected lora_alpha as a number."
        ) from error


def _with_metadata_alpha(part: str, name: str, pair: LowRank, config: Mapping[str, Any]) -> LowRank:
    special = config.get(f"{part}.alpha_pattern") or {}
    # PEFT's patterns may be any regular expression; names, at most anchored, are what trainers write and all we read.
    if odd := [pattern for pattern in special if not re.fullmatch(r"\^?[\w.]+\$?", pattern)]:
        raise ValueError(f"alpha_pattern {odd[0]!r}")
    alpha = next((value for pattern, value in special.items() if re.match(rf"(.*\.)?({pattern})$", name)), None)
    alpha = config.get(f"{part}.lora_alpha") if alpha is None else alpha
    if alpha is None:
        return pair
    return _scaled(name, pair, float(alpha), math.sqrt(pair.rank) if config.get(f"{part}.use_rslora") else pair.rank)
