"""The slider between subject and style, where it has a say, and the bar that shows what it did.

It is counted in doublings of style_bias, so that the middle is 1 and both sides are as long.
"""

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from playground.errors import PlaygroundError
from playground.form import Field

RANGE = (-2.0, 2.0)  # doublings, as TICKS say; the form's own bounds are for experts
STEP = 0.05
CHOICE = ("pattern", "style_bias", "alpha", "beta")  # inputs of K-LoRA's choice

ENDS = (
    '<div class="ends"><span class="subject">◀ more subject</span>'
    '<span class="title">Style slider</span><span class="style">more style ▶</span></div>'
)
TICKS = '<div class="ticks"><span>¼</span><span>½</span><span>1</span><span>2</span><span>4</span></div>'


def knob(fields: Iterable[Field]) -> Field:
    """The input that the slider fills. Raises PlaygroundError for the form of another model."""
    for field in fields:
        if field.name == "style_bias":
            return field
    raise PlaygroundError("The server's form has no style_bias. Expected a server of K-LoRA.")


def start(field: Field) -> float:
    """Where the slider is at first, in doublings."""
    return math.log2(field.default or 1)


def bias(doublings: float) -> float:
    """style_bias, to three digits: what is sent is what is shown."""
    return float(f"{2**doublings:.3g}")


def said(doublings: float) -> str:
    """The slider's place in words."""
    value = bias(doublings)
    if value == 1:
        return '<div class="said">In the middle: as the two LoRAs come. <code>style_bias 1</code></div>'
    more, times = ("style", value) if value > 1 else ("subject", 1 / value)
    return f'<div class="said">The {more} counts {times:.3g} times. <code>style_bias {value:g}</code></div>'


def chooses(inputs: Mapping[str, Any]) -> bool:
    """Whether K-LoRA has a choice, on which alone the server reports."""
    both = inputs.get("content_lora") and inputs.get("style_lora")
    return bool(both) and inputs.get("fusion", "klora") == "klora"


def heeded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is of K-LoRA's choice alone where it makes none, which the server refuses: the page keeps what its
    slider says while somebody looks at the sum, or at one LoRA."""
    return {name: value for name, value in inputs.items() if name not in CHOICE or chooses(inputs)}


def meter(metrics: Mapping[str, Any], value: Any) -> str:
    """Who acted how often, as a bar in two colours, and what to ask for to have the image again. value: style_bias."""
    share, seed = metrics.get("style_share"), metrics.get("seed")
    facts = [f"style_bias {value:g}"] if isinstance(value, float) and share is not None else []
    facts += [f"seed {escape(str(seed))}"] if seed is not None else []
    return (_bar(float(share)) if share is not None else "") + f'<div class="facts">{" · ".join(facts)}</div>'


def _bar(share: float) -> str:
    style = round(100 * share)
    return (
        '<div title="Share of layers and steps in which each LoRA acts"><div class="ends">'
        f'<span class="subject">subject {100 - style} %</span><span class="style">style {style} %</span></div>'
        f'<div class="meter"><i style="width:{100 - style}%"></i></div></div>'
    )
