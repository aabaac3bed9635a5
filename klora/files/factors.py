"""The tensors of a LoRA file -> a pair for each module, by the module's name as the file spells it (stem).

Every tensor is used, or the file is refused by the name of the first that is not. The one exception is zeros that
would be added to a bias or a norm, which extraction from a whole model leaves. What the header tells is checked before
any other tensor is read.   O outputs, I inputs, R rank.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from klora.errors import LoRAError
from klora.files.container import FLOATS, WHOLE, Contents, Spec
from klora.files.lycoris import MAX_DENSE, MAX_ERROR, MAX_RANK, low_rank
from klora.lora import LowRank

MAX_ALPHA = 1e4
EXACT = 1e-6  # relative error up to which a conversion counts as exact: rounding

_FACTOR = re.compile(r"^(.+?)(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight$")
_LYCORIS = re.compile(r"^(.+)\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|diff|alpha)$")
_XLABS = re.compile(r"_lora([12])\.(?=(down|up)\.weight$)")
EMBEDDING = re.compile(r"^bundle_emb\.[^.]+\.(clip_l|clip_g|t5|t5xxl)$")  # bundle_emb.WORD.ENCODER
_ADDED = re.compile(r"\.(diff|diff_b|[wb]_norm|lora_B\.bias)$")  # to what is no matrix: a bias, a norm
_PLAIN = {"A", "B"}
_KINDS = (  # (kind, the sets of parts that it may have)
    ("LoHa", ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},)),
    ("LoKr", tuple({*w1, *w2} for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
                   for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")))),
    ("diff", ({"diff"},)),
)  # fmt: skip
_UNSUPPORTED = {
    r"dora_scale|lora_magnitude_vector": "DoRA", r"lora_mid|lokr_t2|hada_t[12]": "a convolution's Tucker decomposition",
    r"oft_|boft_": "OFT", r"bundle_emb": "an embedding of an unknown text encoder", r"\.diff_b$": "a bias difference",
    r"[wb]_norm$": "a norm difference", r"lora_[AB]\.bias$|\.bias$": "a trained bias",
}  # fmt: skip
_ACCEPTED = "Expected LoRA (lora_A and lora_B), LoHa, LoKr or weight differences of linear layers."


class Module(NamedTuple):
    """One module of a file. kind: LoRA, LoHa, LoKr or diff; keys: {part: key}."""

    kind: str
    keys: Mapping[str, str]


def effective(contents: Contents) -> dict[str, Spec]:
    """{key: spec} of all tensors, without zeros that would be added to a bias or a norm."""
    small = [key for key, (_, shape) in contents.specs.items() if len(shape) == 1 and _ADDED.search(key)]
    zeros = {key for key in small if not _computable(contents.tensor(key)).any()}
    return {key: spec for key, spec in contents.specs.items() if key not in zeros}


def modules(specs: Mapping[str, Spec]) -> dict[str, Module]:
    """{stem: Module}, checked by the header alone. Raises LoRAError."""
    parts: dict[str, dict[str, str]] = {}
    for key in specs:
        if EMBEDDING.match(key):
            continue
        stem, part = split(key)
        if part in parts.setdefault(stem, {}):
            raise LoRAError(f"holds {_tensor_name(part)} of {stem!r} twice, as {key!r}. Expected one adapter.")
        parts[stem][part] = key
    if not parts:
        raise LoRAError(f"holds no tensors. {_ACCEPTED}")
    found = {stem: Module(_kind(stem, keys), keys) for stem, keys in parts.items()}
    dense = 0
    for stem, (kind, keys) in found.items():
        dense += _dense(_checked_shapes(stem, kind, {part: specs[key] for part, key in keys.items()}))
    if dense > MAX_DENSE:
        raise LoRAError(f"would have {dense} weights factorised. Expected at most {MAX_DENSE}; extract a LoRA from it.")
    return found


def converted_sides(specs: Mapping[str, Spec], file_modules: Mapping[str, Module]) -> dict[str, tuple[int, int]]:
    """{stem: (O, I)} of the modules that are no pair yet and must be converted to one."""
    sides = {}
    for stem, module in file_modules.items():
        kind, shapes = module.kind, {part: specs[key].shape for part, key in module.keys.items()}
        if kind == "LoHa":
            sides[stem] = _whole(shapes, "hada_w1")
        elif kind == "LoKr":
            (o1, i1), (o2, i2) = (_whole(shapes, f"lokr_{name}") for name in ("w1", "w2"))
            sides[stem] = o1 * o2, i1 * i2
        elif kind == "diff":
            sides[stem] = shapes["diff"][0], shapes["diff"][1]
    return sides


def _whole(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    """The shape of the factor called name, or of NAME_a NAME_b, the product of two thin ones."""
    rows, columns = (shapes[name],) * 2 if name in shapes else (shapes[f"{name}_a"], shapes[f"{name}_b"])
    return rows[0], columns[1]


def weightless(outputs: int, inputs: int) -> LowRank:
    """A pair of ones for a layer [O, I] that takes no memory: it stands for weights that are not read yet."""
    return LowRank(torch.ones(()).expand(1, inputs), torch.ones(()).expand(outputs, 1))


def outline(specs: Mapping[str, Spec]) -> dict[str, tuple[int, int]]:
    """{stem: (outputs, inputs)} of the plain LoRA modules, whatever else a file holds; 0 for a side that is missing."""
    sides: dict[str, dict[str, int]] = {}
    for key, (_, shape) in specs.items():
        if (found := _factor(key)) and len(shape) >= 2:
            stem, part = found
            sides.setdefault(stem, {})[part] = shape[0 if part == "B" else 1]
    return {stem: (side.get("B", 0), side.get("A", 0)) for stem, side in sides.items()}


def pairs(contents: Contents, file_modules: Mapping[str, Module]) -> tuple[dict[str, LowRank], float]:
    """({stem: pair with alpha/rank folded into B}, the largest error of a converted one relative to its dW, 0 where all
    are exact but for rounding). file_modules: those of modules(). Raises LoRAError."""
    found, worst = {}, 0.0
    for stem, (kind, keys) in file_modules.items():
        parts = {part: _matrix(stem, contents.tensor(key)) for part, key in keys.items() if part != "alpha"}
        alpha = float(contents.tensor(keys["alpha"])) if "alpha" in keys else None
        if kind == "LoRA":
            pair = LowRank(parts["A"], parts["B"])
            found[stem] = pair if alpha is None else scaled(stem, pair, alpha, pair.rank)
        else:
            found[stem], error = _converted(stem, kind, parts, alpha)
            worst = max(worst, error)
    return found, worst if worst > EXACT else 0.0


def _converted(stem: str, kind: str, parts: Mapping[str, Tensor], alpha: float | None) -> tuple[LowRank, float]:
    divisor = _divisor(parts)
    scale = 1.0 if alpha is None or divisor is None else _checked(stem, alpha) / divisor
    pair, error = low_rank(kind, parts, scale)
    if error > MAX_ERROR:
        raise LoRAError(
            f"holds a {kind} of {stem!r}, from which the nearest pair of rank {MAX_RANK} is {error:.1%} away. "
            f"Expected at most {MAX_ERROR:.0%}."
        )
    return pair, error


def scaled(stem: str, pair: LowRank, alpha: float, divisor: float) -> LowRank:
    """The pair with alpha/divisor folded into B, which is float32 then. Raises LoRAError."""
    _checked(stem, alpha)
    return pair if alpha == divisor else LowRank(pair.A, pair.B.float() * (alpha / divisor))


def split(key: str) -> tuple[str, str]:
    """(stem, part) of a key. Raises LoRAError for a tensor that is no part of a linear layer's update."""
    if found := _factor(key):
        return found
    if match := _LYCORIS.match(key):
        return match[1], match[2]
    kind = next((kind for mark, kind in _UNSUPPORTED.items() if re.search(mark, key)), "no LoRA factor")
    raise LoRAError(f"holds {key!r}, which is {kind}. {_ACCEPTED}")


def _factor(key: str) -> tuple[str, str] | None:
    """(stem, "A" or "B") of a plain factor's key."""
    match = _FACTOR.match(_XLABS.sub(r"\1_lora.", key))
    return (match[1], {"down": "A", "up": "B"}.get(match[2], match[2])) if match else None


def _kind(stem: str, keys: Mapping[str, str]) -> str:
    seen = keys.keys() - {"alpha"}
    if seen == _PLAIN:
        return "LoRA"
    if not seen:
        raise LoRAError(f"has an alpha but no factors for {stem!r}. Expected both; the file is damaged.")
    for kind, wholes in _KINDS:
        if seen in wholes:
            return kind
    names = " and ".join(_tensor_name(part) for part in sorted(seen))
    raise LoRAError(f"has only {names} for {stem!r}. Expected all factors of one update; the file is damaged.")


def _tensor_name(part: str) -> str:
    return f"lora_{part}" if part in _PLAIN else part


def _checked_shapes(stem: str, kind: str, specs: Mapping[str, Spec]) -> dict[str, tuple[int, ...]]:
    """{part: shape} of one module's tensors. Raises LoRAError unless they fit each other."""
    for part, (dtype, shape) in specs.items():
        if part == "alpha":
            if dtype not in FLOATS + WHOLE or math.prod(shape) != 1:
                raise LoRAError(f"has alpha {list(shape)} of {dtype} for {stem!r}. Expected one number.")
        elif dtype not in FLOATS:
            raise LoRAError(f"has {dtype} values for {stem!r}. Expected floating-point ones.")
        elif len(shape) != 2 and (len(shape) != 4 or shape[2:] != (1, 1)):
            seen = "adapts the convolution" if len(shape) == 4 else f"holds a tensor of shape {list(shape)} for"
            raise LoRAError(f"{seen} {stem!r}. Expected matrices of linear layers only.")
    shapes = {part: spec.shape for part, spec in specs.items()}
    thin = [(f"{name}_a", f"{name}_b") for name in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2")]
    for rows, columns in [("B", "A"), *thin]:
        if rows in shapes and not (1 <= shapes[rows][1] == shapes[columns][0] <= MAX_RANK):
            raise LoRAError(
                f"has ranks {shapes[columns][0]} and {shapes[rows][1]} for {stem!r}. "
                f"Expected the same rank in both, from 1 to {MAX_RANK}."
            )
    if kind == "LoHa":
        one, other = (_whole(shapes, f"hada_{name}") for name in ("w1", "w2"))
        if one != other:
            raise LoRAError(f"multiplies {one} with {other} for {stem!r}. Expected two updates of one shape.")
    return shapes


def _dense(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many elements have to be factorised to make a pair of this module; 0 for plain LoRA."""
    whole = sum(math.prod(shapes[name]) for name in ("diff", "lokr_w1", "lokr_w2") if name in shapes)
    loha = "hada_w1_a" in shapes and shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0] > MAX_RANK
    return whole + (shapes["hada_w1_a"][0] * shapes["hada_w1_b"][1] if loha else 0)


def _divisor(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None where no factor is thin, for which LyCORIS ignores alpha."""
    return next((len(parts[name]) for name in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if name in parts), None)


def _matrix(stem: str, tensor: Tensor) -> Tensor:
    """The tensor as a matrix; files also write one as a 1 x 1 convolution. Raises LoRAError."""
    tensor = _computable(tensor)
    if not tensor.isfinite().all():
        raise LoRAError(f"has values for {stem!r} that are not finite. Expected numbers; the file is damaged.")
    return tensor.flatten(1)


def _computable(tensor: Tensor) -> Tensor:
    """The tensor, in bfloat16 where it is float8, with which torch computes nothing."""
    return tensor.bfloat16() if tensor.itemsize == 1 else tensor


def _checked(stem: str, alpha: float) -> float:
    if not 0 < alpha <= MAX_ALPHA:
        raise LoRAError(f"has alpha {alpha} for {stem!r}. Expected one number in (0, {MAX_ALPHA:g}].")
    return alpha
