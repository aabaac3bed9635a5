"""A fusion baked into one ordinary LoRA, for tools without K-LoRA: the mean of what it applies over a range of steps.

A LoRA cannot change from step to step, so that the mean is K-LoRA itself only where no layer flips. How far it is, and
how far the file is from the mean, is stated.   O outputs, I inputs, R rank, L layers, T steps.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klora import __version__
from klora.cache import Borrowed
from klora.errors import LoRAError, RequestError
from klora.files.lycoris import MAX_RANK
from klora.files.shelf import Shelf
from klora.form.pair import Export
from klora.fusion import Fusion, Schedule
from klora.lora import LoRA, LowRank, save_lora
from klora.models import FAMILIES
from klora.report.pair import Pair, fused, read_pair
from klora.studio.provenance import canonical, versions
from klora.training.kohya import save_kohya
from klora.training.writing import writing

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_ROLES = ("content", "style")


@dataclass(frozen=True)
class Exported:
    """What a file is.  steps: [first, last) of T.   flipping: share of the layers that flip in these steps.
    contradicted: share of layers and steps in which K-LoRA lets that LoRA act which has the smaller share of the layer.
    errors: {layer: Frobenius norm of dW in the file less the mean dW, relative to the latter's}; error: of all layers
    as one.   ranks: lowest and highest."""

    steps: tuple[int, int, int]
    flipping: float
    contradicted: float
    errors: Mapping[str, float]
    error: float
    ranks: tuple[int, int]

    @property
    def worst(self) -> str:
        """The layer with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])

    def __str__(self) -> str:
        """In two lines, for people."""
        (first, last, count), (low, high) = self.steps, self.ranks
        kind = (
            f"an average, which is another thing than K-LoRA: {self.flipping:.1%} of the layers flip in them, and in "
            f"{self.contradicted:.1%} of layers and steps the other LoRA would have acted than the one it favours"
        )
        return (
            f"steps {first}:{last} of {count}: {kind if self.flipping else 'exact, no layer flips in them'}\n"
            f"{len(self.errors)} layers, ranks {low} to {high}; rank and dtype move the weights by {self.error:.2g} of "
            f"their norm, at most {self.errors[self.worst]:.2g}, in {self.worst}"
        )


def exported(
    wanted: Export, files: Mapping[str, Borrowed], bases: Mapping[str, tuple[str, Path]], out: Path
) -> Exported:
    """Write the file. files: by input, "content_lora" and "style_lora".   bases: {name: (key of FAMILIES, folder)}.
    Raises KLoRAError, and writes nothing then."""
    if out.suffix != ".safetensors":
        raise RequestError(f"out is {out.name!r}. Expected a name that ends in .safetensors.")
    schedule, steps = Schedule.from_pattern(wanted.pattern, wanted.alpha, wanted.beta), wanted.span
    pair = read_pair(files, bases)
    if pair.base is None:  # and the file's own names would be no tool's, nor its text encoders known
        raise LoRAError(f"The LoRAs can only be exported by a base that reads both, but they were {pair}.")
    texts = (pair.content.text_encoders and wanted.content_scale, pair.style.text_encoders and wanted.style_scale)
    if wanted.format == "kohya" and any(texts):  # before the layers are scored, which takes minutes of large files
        raise RequestError("format is kohya, whose files hold no text encoder here. Expected diffusers for these.")
    _refuse_words((pair.content, pair.style))
    _within(steps, count := wanted.num_inference_steps or pair.steps)
    fusion = fused(pair, files)
    wins = fusion.content_wins(schedule, count, wanted.style_bias)
    exact = baked(fusion, wins, wanted.content_scale, wanted.style_scale, steps)
    lora = rounded(reduced(exact, wanted.rank) if wanted.rank else exact, DTYPES[wanted.dtype])
    told = _told(exact, lora, wins, steps)
    family = FAMILIES[bases[pair.base][0]]
    facts = _facts(wanted, pair, files) | _numbers(told)
    facts |= {"pattern": schedule.pattern, "alpha": schedule.alpha, "beta": schedule.beta}
    _save(replace(lora, metadata=_metadata(facts, family.name)), family.component, wanted.format, out)
    return told


def baked(
    fusion: Fusion,
    wins: Tensor,
    content_scale: float = 1.0,
    style_scale: float = 1.0,
    steps: tuple[int, int] | None = None,
) -> LoRA:
    """The mean of what K-LoRA applies: dW = gate_c B_c A_c + gate_s B_s A_s, stacked along the rank, float32.

    wins: content_wins()'s bool [T, L].   steps: [first, last) of T; None: all.   A gate is a LoRA's share of the steps
    times its scale; with a gate of 0 it takes no rank in the layer. Text encoders' layers are added at the scales.
    Raises RequestError for no steps, and where nothing acts; LoRAError for words, which no LoRA file has a place for.
    """
    share = _content_share(wins, steps).tolist()
    loras, scales = (fusion.content, fusion.style), (content_scale, style_scale)
    _refuse_words(loras)
    gates = {
        name: (won * content_scale, (1 - won) * style_scale) for name, won in zip(fusion.layers, share, strict=True)
    }
    encoders = [lora.text_encoders if isinstance(lora, LoRA) else {} for lora in loras]
    texts = {}
    for part in dict.fromkeys(name for encoder in encoders for name in encoder):
        parts = [encoder.get(part, {}) for encoder in encoders]
        texts[part] = _stacked(parts, dict.fromkeys((name for layers in parts for name in layers), scales))
    found = LoRA(_stacked(loras, gates), {part: layers for part, layers in texts.items() if layers})
    if not _all(found):
        raise RequestError(
            f"content_scale is {content_scale:g} and style_scale is {style_scale:g}, with which no layer is changed in "
            "these steps. Expected a scale other than 0 for a LoRA that acts."
        )
    return found


def reduced(lora: LoRA, rank: int) -> LoRA:
    """Every layer's nearest update (Frobenius norm) of at most this rank, float32; those that need no more stay."""
    return _each(lora, lambda name, pair: _nearest(pair, rank) if pair.rank > rank else pair)


def rounded(lora: LoRA, dtype: torch.dtype) -> LoRA:
    """As a file of this dtype holds it. Raises RequestError for numbers that are too large, and ranks that are."""

    def cast(name: str, pair: LowRank) -> LowRank:
        if pair.rank > MAX_RANK:
            raise RequestError(f"{name!r} would have rank {pair.rank}. Expected at most {MAX_RANK}: give a rank.")
        pair = LowRank(pair.A.to(dtype), pair.B.to(dtype))
        if not (pair.A.isfinite().all() and pair.B.isfinite().all()):
            raise RequestError(f"{name!r} has numbers that are too large for {dtype}. Expected dtype bf16 or fp32.")
        return pair

    return _each(lora, cast)


def errors(exact: LoRA, kept: LoRA) -> tuple[dict[str, float], float]:
    """({layer: ||dW - dW'|| / ||dW||}, the same of all layers as one long vector), Frobenius norms; 0 where dW is."""
    there = _all(kept)
    norms = {name: _norms(pair, there[name]) for name, pair in _all(exact).items()}
    lost, whole = zip(*norms.values(), strict=True)
    total = math.hypot(*lost) / (math.hypot(*whole) or 1.0)
    return {name: own[0] / own[1] if own[1] else 0.0 for name, own in norms.items()}, total


def _refuse_words(loras: Sequence[Mapping[str, LowRank]]) -> None:
    for role, lora in zip(_ROLES, loras, strict=True):
        if isinstance(lora, LoRA) and lora.words:
            word = next(iter(lora.words))
            raise LoRAError(f"{role}_lora teaches the word {word!r}. Expected a LoRA of layers alone for an export.")


def _within(steps: tuple[int, int] | None, count: int) -> slice:
    """Those of a run of this many. Raises RequestError."""
    first, last = steps or (0, count)
    if not 0 <= first < last <= count:
        raise RequestError(f"steps is {first}:{last}. Expected A:B with A < B, from 0 to {count}.")
    return slice(first, last)


def _content_share(wins: Tensor, steps: tuple[int, int] | None) -> Tensor:
    """The share of the steps in which content acts, float64 [L]."""
    return wins[_within(steps, len(wins))].double().mean(0)


def _stacked(loras: Sequence[Mapping[str, LowRank]], gates: Mapping[str, tuple[float, ...]]) -> dict[str, LowRank]:
    """The sum of the LoRAs by layer, each at its gate, without layers where all gates are 0."""
    found = {}
    for name, own in gates.items():
        acting = [(lora[name], gate) for lora, gate in zip(loras, own, strict=True) if gate and name in lora]
        if acting:
            B = torch.cat([pair.B.float() * gate for pair, gate in acting], dim=1)
            found[name] = LowRank(torch.cat([pair.A.float() for pair, _ in acting]), B)
    return found


def _nearest(pair: LowRank, rank: int) -> LowRank:
    """By the singular values of B A, found in a core of [R, R]: the product itself is never made (Eckart-Young)."""
    Q_B, R_B = torch.linalg.qr(pair.B.double())
    Q_A, R_A = torch.linalg.qr(pair.A.double().T)
    U, s, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root = s[:rank].sqrt()  # to each factor, so that neither leaves the range of fp16 before the other
    return LowRank((root[:, None] * V[:rank] @ Q_A.T).float(), (Q_B @ U[:, :rank] * root).float())


def _norms(exact: LowRank, kept: LowRank) -> tuple[float, float]:
    """(||dW - dW'||, ||dW||), float64: of products of the triangles of [B, B'] and [A; A'], of which the first columns
    are those of B and A."""
    R_A = torch.linalg.qr(torch.cat([exact.A.double(), kept.A.double()]).T, mode="r").R
    R_B = torch.linalg.qr(torch.cat([exact.B.double(), -kept.B.double()], dim=1), mode="r").R
    own = slice(exact.rank)
    return (R_B @ R_A.T).norm().item(), (R_B[:, own] @ R_A[:, own].T).norm().item()


def _each(lora: LoRA, change: Callable[[str, LowRank], LowRank]) -> LoRA:
    layers = {name: change(name, pair) for name, pair in lora.items()}
    texts = {part: {name: change(name, pair) for name, pair in of.items()} for part, of in lora.text_encoders.items()}
    return LoRA(layers, texts)


def _all(lora: LoRA) -> dict[str, LowRank]:
    """Of the denoiser and of the text encoders."""
    texts = {f"{part}.{name}": pair for part, layers in lora.text_encoders.items() for name, pair in layers.items()}
    return {**lora, **texts}


def _told(exact: LoRA, lora: LoRA, wins: Tensor, steps: tuple[int, int] | None) -> Exported:
    share = _content_share(wins, steps)
    less, span = torch.minimum(share, 1 - share), (*(steps or (0, len(wins))), len(wins))
    flipping, contradicted = (less > 0).double().mean().item(), less.mean().item()
    ranks = [pair.rank for pair in _all(lora).values()]
    return Exported(span, flipping, contradicted, *errors(exact, lora), (min(ranks), max(ranks)))


def _facts(wanted: Export, pair: Pair, files: Mapping[str, Borrowed]) -> dict[str, Any]:
    """What the pair and the wish say, without secrets."""
    facts = asdict(wanted) | {"base": pair.base, "versions": versions()}
    for role, lora in zip(_ROLES, (pair.content, pair.style), strict=True):
        file = files[name := f"{role}_lora"]
        facts[name] = canonical(wanted.loras[name], fetched=file.scores is not None)
        facts[f"{role}_sha256"] = Shelf().sha256(file.path, file.scores)
        facts[f"{role}_trigger"] = lora.metadata.get("trigger") or next(iter(file.triggers), "")
    return facts


def _numbers(told: Exported) -> dict[str, Any]:
    first, last, count = told.steps
    return {
        "steps": [first, last],
        "num_inference_steps": count,
        "exact": not told.flipping,
        "flipping": told.flipping,
        "contradicted": told.contradicted,
        "error": told.error,
        "largest_error": {told.worst: told.errors[told.worst]},
    }


def _metadata(facts: Mapping[str, Any], family: str) -> dict[str, str]:
    """Strings, as a header takes them. trigger is one word for our own prompts, trigger_phrase all for everybody."""
    words = [word for word in (facts["content_trigger"], facts["style_trigger"]) if word]
    plain = {"klora": __version__, "family": family, "lora_type": "fusion"}
    if words:
        plain |= {"trigger": words[0], "modelspec.trigger_phrase": ", ".join(dict.fromkeys(words))}
    return plain | {"klora_export": json.dumps(facts, allow_nan=False)}


def _save(lora: LoRA, component: str, form: str, out: Path) -> None:
    with writing("LoRA"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if form == "kohya":
            save_kohya(out, lora, component, lora.metadata)
        else:
            save_lora(out, lora, component)
