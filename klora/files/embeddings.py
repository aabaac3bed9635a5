"""Words that a LoRA file teaches the text encoders: a cog-sdxl tar's embeddings.pti and OneTrainer's bundle_emb.

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


def taught(contents: Contents, widths: Mapping[str, int]) -> Words:
    """The words of an open file. widths: of the base's text encoders, by component. Raises LoRAError."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in filter(EMBEDDING.match, contents.specs):
        _, word, encoder = key.split(".")
        component = "text_encoder" if encoder == "clip_l" else "text_encoder_2"
        found.setdefault(word, {})[component] = _checked(key, contents.tensor(key), component, widths)
    return found | _of_cog_sdxl(contents, widths)


def _of_cog_sdxl(contents: Contents, widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """special_params.json says {"TOK": "<s0><s1>"}; a prompt may use either."""
    if not contents.embeddings:
        return {}
    keys = {"text_encoder": "text_encoders_0", "text_encoder_2": "text_encoders_1"}
    held = {part: (key, contents.embeddings[key]) for part, key in keys.items() if key in contents.embeddings}
    vectors = {part: _checked(key, tensor, part, widths) for part, (key, tensor) in held.items()}
    words = {str(word): str(tokens) for word, tokens in contents.words.items()} or {"TOK": "<s0><s1>"}
    count = {len(part) for part in vectors.values()}
    for word, tokens in words.items():
        if not vectors or count != {len(re.findall(r"<[^<>]+>", tokens))} or not word.strip():
            raise LoRAError(f"has special_params.json say {word!r} is {tokens!r}. Expected a token for each embedding.")
    return {spelled: vectors for word, tokens in words.items() for spelled in (word, tokens)}


def _checked(key: str, tensor: Tensor, component: str, widths: Mapping[str, int]) -> Tensor:
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
