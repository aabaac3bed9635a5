"""Prompts that are longer than a text encoder reads at once. Knows no family."""

from itertools import pairwise
from typing import Any

from klora.errors import RequestError

MOST_PIECES = 8


def pieces(tokenizer: Any, prompt: str) -> list[str]:
    """A prompt in parts of as many tokens as a text encoder reads at once, cut between words wherever there are any.
    One that fits is its own only part.

    tokenizer: a fast one of transformers. Raises RequestError for more than MOST_PIECES.
    """
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    check_length(tokenizer, prompt, MOST_PIECES * room)
    parts, rest = list[str](), prompt
    while len(spans := _spans(tokenizer, rest)) > room:
        cut = _cut(tokenizer, rest, spans[: room + 1])
        parts.append(rest[:cut])
        rest = rest[cut:]
    return [*parts, rest]


def check_length(tokenizer: Any, prompt: str, most: int) -> None:
    """Raise RequestError for a prompt of more tokens than that, its first words named: what is cut would be missed."""
    if (seen := len(_spans(tokenizer, prompt))) > most:
        raise RequestError(f"The prompt {prompt[:40]!r}... has {seen} tokens. Expected at most {most} on this base.")


def _cut(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> int:
    """Where the text is cut so that the first part fits: at the last word that these spans have, but one, else at the
    last character. Half a word may have other tokens than the whole had there, and more."""
    starts = [(start, start > end) for (_, end), (start, _) in pairwise(spans) if start >= end]
    places = [start for word in (True, False) for start, spaced in reversed(starts) if spaced is word]
    return next((place for place in places if len(_spans(tokenizer, text[:place])) < len(spans)), spans[-1][0])


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where each token's characters are, [start, end); those of an encoder's own, as its first and last, left out."""
    # Not verbose: it would warn of a length that is dealt with here.
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    return tokenizer(text, **options)["offset_mapping"]
