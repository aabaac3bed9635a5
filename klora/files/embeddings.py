"""Words that a LoRA teaches the text encoders: OneTrainer's bundle_emb in its file, a cog-sdxl tar's embeddings.pti,
NAME_emb.safetensors beside it, as diffusers' advanced trainers write it.

Knows nothing of how they are lent (klora.generation.words).
"""

import re
from collections.abc import Mapping

from torch import Tensor

from klora.errors import LoRAError
from klora.files.container import Contents
from klora.files.factors import EMBEDDING
from klora.lora import Words

MAX_VECTORS = 64  # for a word
_FIRST = ("clip_l", "text_encoders_0")  # what trainers call the first text encoder's vectors, and only those


def taught_words(contents: Contents, widths: Mapping[str, int]) -> Words:
    """The words of an open file. widths: {text encoder's component: width of its embeddings}. Raises LoRAError."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in filter(EMBEDDING.match, contents.specs):
        _, word, encoder = key.split(".")
        found.setdefault(word, {})[_part(encoder)] = _checked(key, contents.tensor(key), _part(encoder), widths)
    return found | _beside(contents, widths)


def _beside(contents: Contents, widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """The words of contents.embeddings. With special_params.json, {"TOK": "<s0><s1>"}, a prompt may use TOK or
    <s0><s1>. Without it the words are each token, <s0>, and all of them in a row, <s0><s1>."""
    if not contents.embeddings:
        return {}
    vectors = {_part(key): _checked(key, rows, _part(key), widths) for key, rows in contents.embeddings.items()}
    count = {len(rows) for rows in vectors.values()}
    tokens = [f"<s{i}>" for i in range(max(count))]
    words = {str(word): str(row) for word, row in contents.words.items()} or {"".join(tokens): "".join(tokens)}
    for word, row in words.items():
        if count != {len(re.findall(r"<[^<>]+>", row))} or not word.strip():
            raise LoRAError(f"has {word!r} stand for {row!r}. Expected a token for each embedding.")
    whole = {spelled: vectors for word, row in words.items() for spelled in (word, row)}
    single = {token: {part: rows[i : i + 1] for part, rows in vectors.items()} for i, token in enumerate(tokens)}
    return whole if contents.words else single | whole


def _part(encoder: str) -> str:
    """The component of the text encoder that a trainer calls so."""
    return "text_encoder" if encoder in _FIRST else "text_encoder_2"


def _checked(key: str, tensor: Tensor, component: str, widths: Mapping[str, int]) -> Tensor:
    """The embeddings under a key as [N, D]. Raises LoRAError unless they are finite and of the component's width."""
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if component not in widths:
        raise LoRAError(f"holds {key!r} for a {component}, which this base does not have.")
    if tensor.ndim != 2 or tensor.shape[1] != widths[component] or not 1 <= len(tensor) <= MAX_VECTORS:
        raise LoRAError(
            f"holds {key!r} of {list(tensor.shape)}. Expected up to {MAX_VECTORS} vectors of {widths[component]}."
        )
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise LoRAError(f"has values for {key!r} that are not finite. Expected numbers; the file is damaged.")
    return tensor.float()
