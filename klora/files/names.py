"""To which layers of a base the pairs of a file belong. Names are matched against an inventory, the base's own linear
layers and their shapes, so that no layer is listed by hand; those of other code bases (sgm, BFL, XLabs) go through a
converter.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from klora.errors import LoRAError
from klora.files.factors import split
from klora.lora import LowRank

# {component: {module name: (O, I)}}, the denoiser first, its modules in execution order
Inventory = Mapping[str, Mapping[str, tuple[int, int]]]
LayerKey = tuple[str, str]  # (component, module name), both as the base has them
# Turns tensors under foreign module names, kohya's sgm and BFL or XLabs', into diffusers-spelled ones
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]

UNKNOWN = "adapts {!r}, which is no linear layer of this base. Expected layers of the base that this request runs."
_WRAPPERS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "lora_unet.", "unet.",
             "lora_transformer.", "transformer.")  # fmt: skip
_ENCODERS = (  # kohya's, where FLUX's T5 is te3, and those that ComfyUI saves
    r"lora_te1?[._]|text_encoders\.clip_l\.transformer\.",
    r"lora_te[23][._]|text_encoders\.(?:clip_g|t5xxl)\.transformer\.",
)
_XLABS = re.compile(r"(?:diffusion_model\.)?((?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj))([12]?)$")


def located(pairs: Mapping[str, LowRank], inventory: Inventory, rename: Rename) -> dict[LayerKey, LowRank]:
    """{layer of the base: pair}. Raises LoRAError where the base has no such layer, or of another shape; zeros for an
    unknown layer of a text encoder are left out.   pairs: by their names in the file."""
    if len(pairs) > (most := sum(len(names) for names in inventory.values())):  # and converters are quadratic
        raise LoRAError(f"adapts {len(pairs)} layers. Expected at most the {most} that this base has.")
    lookups = {part: _lookup(names) for part, names in inventory.items()}
    found: dict[LayerKey, LowRank] = {}
    foreign: dict[str, str] = {}
    for stem, pair in pairs.items():
        part, spelled = component(stem, list(inventory))
        if name := lookups[part].get(spelled):
            _add(found, (part, name), pair, stem, inventory)
        elif part != next(iter(inventory)):
            if pair.A.any() and pair.B.any():  # extraction leaves zeros of an encoder that was not trained
                raise LoRAError(UNKNOWN.format(stem))
        else:
            key = _foreign(stem, spelled)
            if key in foreign.values():
                raise LoRAError(f"adapts {spelled!r} twice, once as {stem!r}. Expected one pair of factors a layer.")
            foreign[stem] = key
    for stem, spelled, pair in _renamed(foreign, pairs, rename):
        part, spelled = component(spelled, list(inventory))
        if (name := lookups[part].get(spelled)) is None:
            raise LoRAError(UNKNOWN.format(stem))
        _add(found, (part, name), pair, stem, inventory)
    return found


def _add(found: dict[LayerKey, LowRank], key: LayerKey, pair: LowRank, stem: str, inventory: Inventory) -> None:
    seen, expected = pair.shape, inventory[key[0]][key[1]]
    if seen != expected:
        raise LoRAError(f"was made for another base: {stem!r} is {seen} there. Expected {expected}.")
    if key in found:
        raise LoRAError(f"adapts {key[1]!r} twice, once as {stem!r}. Expected one pair of factors a layer.")
    found[key] = pair


def _lookup(names: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """{spelling, with dots or kohya's underscores: module name} of a component's modules."""
    # transformers moves CLIP's layers in and out of "text_model" between versions and classes; files always say it.
    bare = {name.removeprefix("text_model."): name for name in names}
    return bare | {spelled.replace(".", "_"): name for spelled, name in bare.items()}


def component(stem: str, components: list[str]) -> tuple[str, str]:
    """(component, module name) of a name in a file: what comes before a module's name says the component, and is taken
    off; the rest stays as the file spells it. components: the denoiser first."""
    denoiser, *encoders = components
    for encoder, others in zip(encoders, _ENCODERS, strict=False):
        if match := re.match(rf"({encoder}\.|{others})(text_model[._])?", stem):
            return encoder, stem[match.end() :]
    while prefix := next((wrapper for wrapper in _WRAPPERS if stem.startswith(wrapper)), ""):
        stem = stem.removeprefix(prefix)
    stem = re.sub(r"^(lora_unet|lora_transformer|lycoris)_", "", stem).replace(".processor.", ".")
    return denoiser, re.sub(r"([._])to_out$", r"\1to_out\g<1>0", stem)


def _foreign(stem: str, spelled: str) -> str:
    """The key under which a converter takes a pair, up to its end, which is down.weight and up.weight."""
    if xlabs := _XLABS.match(stem):
        return f"{xlabs[1]}_lora{xlabs[2]}."
    return f"lora_unet_{spelled.replace('.', '_')}.lora_"


def _renamed(
    foreign: Mapping[str, str], pairs: Mapping[str, LowRank], rename: Rename
) -> Iterator[tuple[str, str, LowRank]]:
    """(stem, new spelling, pair) of all that a converter makes of the pairs; one stem may become several.

    foreign: {stem: _foreign() key}. Converters do not say which stem a result came from, and silently drop names that
    they do not know. So each runs twice, first on pairs whose A holds nothing but the number of its stem.
    """
    stems = list(foreign)
    # Expanded, so that this run computes next to nothing; in bfloat16, that may be torch's default, 257 would be 256.
    zero = torch.zeros((), dtype=torch.float64)
    numbered = {
        stem: LowRank((zero + i).expand(pairs[stem].A.shape), zero.expand(pairs[stem].B.shape))
        for i, stem in enumerate(stems)
    }
    numbers = {spelled: int(pair.A[0, 0]) for spelled, pair in _converted(foreign, numbered, rename).items()}
    if dropped := set(range(len(stems))) - set(numbers.values()):
        raise LoRAError(UNKNOWN.format(stems[min(dropped)]))
    for spelled, pair in _converted(foreign, pairs, rename).items():
        yield stems[numbers[spelled]], spelled, pair


def _converted(foreign: Mapping[str, str], pairs: Mapping[str, LowRank], rename: Rename) -> dict[str, LowRank]:
    """{diffusers' spelling: pair}. XLabs' names are converted apart: their converter takes no others beside them."""
    kinds = [{stem: key for stem, key in foreign.items() if key.endswith(end)} for end in ("_", ".")]
    return {name: pair for kind in kinds if kind for name, pair in _once(kind, pairs, rename).items()}


def _once(foreign: Mapping[str, str], pairs: Mapping[str, LowRank], rename: Rename) -> dict[str, LowRank]:
    tensors = {f"{key}down.weight": pairs[stem].A for stem, key in foreign.items()}
    tensors |= {f"{key}up.weight": pairs[stem].B for stem, key in foreign.items()}
    try:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in rename(tensors).items():
            stem, part = split(key)
            parts.setdefault(stem, {})[part] = tensor
        return {stem: LowRank(**pair) for stem, pair in parts.items()}
    except Exception as error:  # converters raise KeyError, ValueError, RuntimeError, AssertionError ... for one cause
        for stem, key in foreign.items() if len(foreign) > 1 else ():
            _once({stem: key}, pairs, rename)  # raises for the one that is to blame
        raise LoRAError(UNKNOWN.format(min(foreign))) from error
