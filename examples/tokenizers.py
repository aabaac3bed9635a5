"""CLIP's and T5's tokenizers for a small vocabulary: whole words for what is known, pieces for what is not.

Knows nothing of pictures and of models.
"""

import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import transformers
from tokenizers import pre_tokenizers


def clip_tokenizer(words: str, pad_token: str, max_length: int = 77) -> transformers.CLIPTokenizer:
    """CLIP's tokens in CLIP's order: 256 bytes, the same at the end of a word, merges, start, end; "!" is 0."""
    merges = _byte_pair_merges(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)


def t5_tokenizer(words: str, max_length: int = 512) -> transformers.T5Tokenizer:
    """A unigram vocabulary of whole words and of single ASCII characters; anything else is <unk>."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    characters = [(character, -8.0) for character in "▁" + string.ascii_letters + string.digits + string.punctuation]
    known = [(f"▁{word}", -4.0) for word in dict.fromkeys(words.split())]
    return transformers.T5Tokenizer(vocab=special + characters + known, model_max_length=max_length)


@cache
def _byte_pair_merges(words: str) -> list[tuple[str, str]]:
    """Merge the most frequent pair until every word is one token (tokenizers' own trainer breaks ties at random)."""
    merges, spellings = [], [[*word[:-1], f"{word[-1]}</w>"] for word in words.split()]
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        spellings = [_merge(spelling, merges[-1]) for spelling in spellings]
    return merges


def _merge(spelling: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in spelling:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
