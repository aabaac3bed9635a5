"""LoRAs that were trained here, as the field of a LoRA shows them. Knows no page."""

from collections.abc import Mapping
from itertools import count

MOST_CHARACTERS = 64 << 20  # of a data URI that the server takes as a LoRA


def handed_over(result: tuple[str, str], trained: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """(what stands in the field, what such texts stand for): a URL for itself, a data URI behind a short name.

    result: its name, and where it is.  trained: what the texts so far stand for; a name that another LoRA has gets a
    number.
    """
    name, given = result
    if not given.startswith("data:"):
        return given, dict(trained)
    numbered = (name if number == 1 else f"{name} ({number})" for number in count(1))
    text = next(text for text in numbered if trained.get(text, given) == given)
    return text, {**trained, text: given}
