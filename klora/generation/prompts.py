"""What the denoiser is told: a request's prompts, with its LoRAs' trigger words, and what the text encoders make of
them, lent their LoRAs' words and layers."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from klora.errors import RequestError
from klora.form.request import Request
from klora.generation.acting import ActingLoRA, Record, acting_loras, encoder_plan
from klora.generation.words import teaching, word_pattern
from klora.layers import attached
from klora.lora import LoRA, Words
from klora.models.family import Conditioning, Family

Encode = Callable[[str, str], Conditioning]
"""(prompt, negative prompt, "" for none) -> what the denoiser reads."""

Batch = tuple[list[int], Conditioning]
"""What the denoiser runs at once: places among the draws, and what it reads."""


class Draw(NamedTuple):
    """What sets an image apart from the others of its batch. prompt: with the trigger words."""

    prompt: str
    seed: int


def draws_of(request: Request, content: LoRA | None, style: LoRA | None, record: Record) -> list[Draw]:
    """As many seeds as there are outputs, and the prompt with the trigger words that the LoRAs' files name where it
    lacks them, and whatever word they teach: the subject's in front, the style's behind."""
    prompt, added = request.prompt, []
    for _, lora, _ in acting_loras(request, content, style) if request.add_triggers else ():
        trigger = lora.metadata.get("trigger", "")
        if trigger and not any(has_word(prompt, word, lora) for word in (trigger, *lora.words)):
            added.append(trigger)
            styled = lora.metadata.get("lora_type") == "style"
            prompt = f"{prompt}, {trigger} style" if styled else f"{trigger}, {prompt}"
    if added:
        record("triggers_added", ", ".join(added))
    return [Draw(prompt, request.seed + i) for i in range(request.num_outputs)]


def has_word(prompt: str, word: str, lora: LoRA) -> bool:
    """Whether a prompt has a word that calls a LoRA: whole, and as it is spelled where the LoRA teaches it."""
    case = re.NOFLAG if word in lora.words else re.IGNORECASE
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, case) is not None


def plain_encoder(model: Family) -> Encode:
    """How a prompt is encoded without a LoRA's words and text-encoder layers."""
    return lambda prompt, negative: model.encode_prompt([prompt], [negative] if negative else None)


def encoded(
    model: Family, request: Request, draws: Sequence[Draw], acting: Sequence[ActingLoRA], encode: Encode
) -> list[Batch]:
    """Batches of draws with prompts of one length; mostly there is one batch. encode: used where no LoRA that acts has
    words or text-encoder layers. Raises RequestError."""
    if not any(lora.text_encoders or lora.words for _, lora, _ in acting):
        return _read(encode, draws, request.negative_prompt)
    with ExitStack() as loans:
        for component, encoder in model.text_encoders.items():
            loans.enter_context(attached(encoder, encoder_plan(acting, component)))
        with_tokens = loans.enter_context(teaching(model.pipe, _words(request, draws, acting)))
        draws = [Draw(with_tokens(draw.prompt), draw.seed) for draw in draws]
        return _read(plain_encoder(model), draws, with_tokens(request.negative_prompt))


def _read(encode: Encode, draws: Sequence[Draw], negative: str) -> list[Batch]:
    """Each batch has a row for each of its draws, or one for all where they share a prompt. Each prompt is read once,
    and by itself, so that it is read as it would be alone."""
    read = {prompt: encode(prompt, negative) for prompt in dict.fromkeys(draw.prompt for draw in draws)}
    alike: dict[int, list[int]] = {}
    for place, draw in enumerate(draws):
        alike.setdefault(read[draw.prompt]["prompt_embeds"].shape[1], []).append(place)
    return [(places, _rows([read[draws[place].prompt] for place in places])) for places in alike.values()]


def _rows(parts: Sequence[Conditioning]) -> Conditioning:
    first = parts[0]
    if all(part is first for part in parts):
        return first
    return {name: torch.cat([part[name] for part in parts]) for name in first}


def _words(request: Request, draws: Sequence[Draw], acting: Sequence[ActingLoRA]) -> Words:
    """The words that these LoRAs teach the text encoders, also as content:WORD and style:WORD. Raises RequestError
    where a prompt has a word that both teach."""
    each = [(role, word, vectors) for role, lora, _ in acting for word, vectors in lora.words.items()]
    qualified = {f"{role}:{word}": vectors for role, word, vectors in each}
    prompts = (request.negative_prompt, *(draw.prompt for draw in draws))
    # "content:<s0><s1>" does not name "<s1>".
    rest = [word_pattern(qualified).sub("", prompt) for prompt in prompts if qualified]
    bare: dict[str, Mapping[str, Tensor]] = {}
    for _, word, vectors in each:
        if word in bare and any(map(word_pattern([word]).search, rest)):
            raise RequestError(
                f"Both LoRAs teach the word {word!r}. Write content:{word} or style:{word} in the prompt."
            )
        bare[word] = vectors
    return bare | qualified
