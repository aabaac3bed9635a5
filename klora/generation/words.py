"""Lend words to a base for the length of a `with` block: tokens that its tokenizers lack, and their vectors.

The base's own tokenizers and embeddings are not changed: copies stand in for them. A text encoder without vectors for a
word reads it as the text that it is, as it did when the word was learnt.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers.normalizers import Replace, Sequence
from torch import Tensor, nn

from klora.layers import lend, lending
from klora.lora import Words

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # of a diffusers pipeline


@contextmanager
def teaching(pipe: Any, words: Words) -> Iterator[Callable[[str], str]]:
    """Teach a diffusers pipeline words. Yields what puts the new tokens where a prompt has them: as many for each word
    as it has vectors."""
    tokens = {word: _tokens(number, parts) for number, (word, parts) in enumerate(words.items())}
    with lending() as loans:
        for component, tokenizer in _TOKENIZERS.items() if words else ():
            more = copy.deepcopy(getattr(pipe, tokenizer))
            lend(loans, pipe.__dict__, tokenizer, more)
            vectors_of = {word: parts[component] for word, parts in words.items() if component in parts}
            _read_as_text(more, {" ".join(tokens[word]): word for word in words.keys() - vectors_of.keys()})
            if not vectors_of:
                continue
            more.add_tokens([token for word in vectors_of for token in tokens[word]])
            rows = {
                more.convert_tokens_to_ids(token): vector
                for word, vectors in vectors_of.items()
                for token, vector in zip(tokens[word], vectors, strict=False)
            }
            encoder = getattr(pipe, component)
            table = encoder.get_input_embeddings()
            extended = _extended(table, rows, len(more))
            for slots, name in _places(encoder, table):
                lend(loans, slots, name, extended)
        yield lambda prompt: _replaced(prompt, tokens)


def _tokens(number: int, parts: Mapping[str, Tensor]) -> list[str]:
    return [f"<klora{number}-{i}>" for i in range(max(len(vectors) for vectors in parts.values()))]


def _read_as_text(tokenizer: Any, words: Mapping[str, str]) -> None:
    """Have a tokenizer read words as text, "content:WORD" as "WORD". words: {the tokens of a word: the word}."""
    texts = [Replace(tokens, re.sub("^(content|style):", "", word)) for tokens, word in words.items()]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([*texts, *filter(None, [backend.normalizer])])


def _places(encoder: nn.Module, table: nn.Embedding) -> Iterator[tuple[dict[str, Any], str]]:
    """(its parent's table of parts, key) of each embedding with these weights: T5 has two."""
    for name, module in list(encoder.named_modules(remove_duplicate=False)):  # they may be one
        if isinstance(module, nn.Embedding) and module.weight is table.weight:
            path, _, child = name.rpartition(".")
            yield encoder.get_submodule(path)._modules, child


def _extended(table: nn.Embedding, rows: Mapping[int, Tensor], size: int) -> nn.Embedding:
    """A copy of an embedding with these rows, and zeros for tokens that another encoder alone has of a word."""
    weight = table.weight.new_zeros(max(size, len(table.weight)), table.weight.shape[1])
    weight[: len(table.weight)] = table.weight
    for index, vector in rows.items():
        weight[index] = vector
    return nn.Embedding.from_pretrained(weight, freeze=True)


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Finds these words, at least one, in a prompt: whole, and not after "content:" or "style:" unless the word itself
    has that. The longest first: one may begin another."""
    longest = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?<!content:)(?<!style:)(?:{'|'.join(map(re.escape, longest))})(?!\w)")


def _replaced(prompt: str, tokens: Mapping[str, list[str]]) -> str:
    """A prompt with each word's tokens in its place. All at once: no word is looked for in another one's tokens."""
    return word_pattern(tokens).sub(lambda match: " ".join(tokens[match[0]]), prompt) if tokens else prompt
