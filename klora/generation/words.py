"""Lend words to a base for the length of a `with` block: tokens that its tokenizers lack, and their vectors.

The base's own tokenizers and embeddings are not changed: copies stand in for them.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from klora.layers import lend, lending
from klora.lora import Words

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # of a diffusers pipeline


@contextmanager
def taught(pipe: Any, words: Words) -> Iterator[Callable[[str], str]]:
    """Teach a diffusers pipeline words. Yields what puts the new tokens where a prompt has them: as many for each word
    as it has vectors."""
    tokens = {word: _tokens(number, parts) for number, (word, parts) in enumerate(words.items())}
    with lending() as loans:
        for component, tokenizer in _TOKENIZERS.items() if words else ():
            encoder = getattr(pipe, component)
            more = copy.deepcopy(getattr(pipe, tokenizer))
            more.add_tokens([token for own in tokens.values() for token in own])
            rows = {
                more.convert_tokens_to_ids(token): vector
                for word, parts in words.items()
                for token, vector in zip(tokens[word], parts.get(component, ()), strict=False)
            }
            lend(loans, pipe.__dict__, tokenizer, more)
            table = encoder.get_input_embeddings()
            extended = _extended(table, rows, len(more))
            for slots, name in _places(encoder, table):
                lend(loans, slots, name, extended)
        yield lambda prompt: _replaced(prompt, tokens)


def _tokens(number: int, parts: Mapping[str, Tensor]) -> list[str]:
    return [f"<klora{number}-{i}>" for i in range(max(len(vectors) for vectors in parts.values()))]


def _places(encoder: nn.Module, table: nn.Embedding) -> Iterator[tuple[dict[str, Any], str]]:
    """(its parent's table of parts, key) of each embedding with these weights: T5 has two."""
    for name, module in list(encoder.named_modules(remove_duplicate=False)):  # they may be one
        if isinstance(module, nn.Embedding) and module.weight is table.weight:
            path, _, child = name.rpartition(".")
            yield encoder.get_submodule(path)._modules, child


def _extended(table: nn.Embedding, rows: Mapping[int, Tensor], size: int) -> nn.Embedding:
    """A copy of an embedding with these rows, and zeros for the tokens that only another encoder was taught."""
    weight = table.weight.new_zeros(max(size, len(table.weight)), table.weight.shape[1])
    weight[: len(table.weight)] = table.weight
    for index, vector in rows.items():
        weight[index] = vector
    return nn.Embedding.from_pretrained(weight, freeze=True)


def spoken(words: Iterable[str]) -> re.Pattern[str]:
    """Where a prompt has one of some words, one at least: whole, and not as a LoRA's own, "style:WORD", unless that is
    one of them. The longest first: one may begin another."""
    longest = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?<!content:)(?<!style:)(?:{'|'.join(map(re.escape, longest))})(?!\w)")


def _replaced(prompt: str, tokens: Mapping[str, list[str]]) -> str:
    """All at once: what stands for one word is no place to look for another."""
    return spoken(tokens).sub(lambda found: " ".join(tokens[found[0]]), prompt) if tokens else prompt
