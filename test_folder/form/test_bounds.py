"""Numbers, choices and prompts: what a request takes, and the sentence for what it does not."""

import math
from dataclasses import fields
from typing import Any

import pytest

from klora.errors import RequestError
from klora.form.request import Request
from test_folder.form.asked import CHOICES, PICTURE, request

WHOLE = {
    "width": (64, 2048), "height": (64, 2048), "num_outputs": (1, 4), "num_inference_steps": (1, 500),
    "seed": (0, 4294967295), "output_quality": (0, 100),
}  # fmt: skip
FLOATS = {
    "content_scale": (-1, 3), "style_scale": (-1, 3), "style_bias": (0, 10), "alpha": (0, 10), "beta": (0, 10),
    "prompt_strength": (0, 1), "guidance_scale": (0, 50),
}  # fmt: skip


UNCHOSEN = "K-LoRA makes no choice without content_lora, style_lora and fusion klora"


def refusal(**given: Any) -> str:
    with pytest.raises(RequestError) as error:
        request(**given)
    return str(error.value)


def test_a_lora_acts_at_its_own_strength_unless_it_is_said_otherwise() -> None:
    assert (request().content_scale, request().style_scale) == (1, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (low, high) in WHOLE.items() for value in (low - 1, high + 1)]
    + [(name, math.nextafter(low, -math.inf)) for name, (low, _) in FLOATS.items()]
    + [(name, math.nextafter(high, math.inf)) for name, (_, high) in FLOATS.items()]
    + [(name, value) for name in FLOATS for value in (math.nan, math.inf, -math.inf)],
)
def test_a_number_outside_its_bounds_is_refused_in_one_sentence(name: str, value: float) -> None:
    low, high = (WHOLE | FLOATS)[name]
    assert refusal(**{name: value}) == f"{name} is {value}. Expected {low} to {high}."


@pytest.mark.parametrize(("name", "bounds"), (WHOLE | FLOATS).items())
def test_both_bounds_are_accepted(name: str, bounds: tuple[float, float]) -> None:
    assert [getattr(request(**{name: value}), name) for value in bounds] == [*bounds]


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
@pytest.mark.parametrize("wrong", ["", "nope", " png", "KLORA", "1.0"])
def test_a_choice_that_is_not_listed_is_refused_in_one_sentence(name: str, choices: list[str], wrong: str) -> None:
    assert refusal(**{name: wrong}) == f"{name} is {wrong!r}. Expected one of {', '.join(choices)}."


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in CHOICES for choice in CHOICES[name]])
def test_every_listed_choice_is_accepted(name: str, choice: str) -> None:
    needed = {"custom": {"width": 64}, "match_input_image": {"image": PICTURE}}.get(choice, {})
    assert getattr(request(**{name: choice, **needed}), name) == choice


def test_no_bound_and_no_choice_is_missing_above() -> None:
    bounded = {
        item.name: (item.metadata["ge"], item.metadata["le"]) for item in fields(Request) if "ge" in item.metadata
    }
    chosen = {item.name: list(item.metadata["choices"]) for item in fields(Request) if "choices" in item.metadata}
    assert (bounded, chosen) == (WHOLE | FLOATS, CHOICES)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_a_blank_prompt_is_refused(prompt: str) -> None:
    assert refusal(prompt=prompt) == "prompt is empty. Expected what the image shows."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 512, "aspect_ratio": "16:9"}, "width or height is given with aspect_ratio 16:9. Expected custom."),
        (
            {"height": 512, "aspect_ratio": "match_input_image", "image": PICTURE},
            "width or height is given with aspect_ratio match_input_image. Expected custom.",
        ),
        ({"aspect_ratio": "custom"}, "aspect_ratio is custom but neither width nor height is given. Give one or both."),
        (
            {"aspect_ratio": "match_input_image"},
            "aspect_ratio is match_input_image but image is not given. Give it, or a ratio.",
        ),
        ({"mask": PICTURE}, "mask is given without image. Expected the image to repaint, too."),
        ({"fusion": "sum", "style_bias": 3}, f"style_bias is 3.0 and {UNCHOSEN}. Expected 1.0."),
        ({"fusion": "style", "pattern": "s"}, f"pattern is s and {UNCHOSEN}. Expected auto."),
        ({"fusion": "content", "alpha": 0}, f"alpha is 0.0 and {UNCHOSEN}. Expected none."),
        ({"fusion": "sum", "beta": 1}, f"beta is 1.0 and {UNCHOSEN}. Expected none."),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    assert refusal(**given) == message


def test_true_is_no_number() -> None:
    assert refusal(num_outputs=True) == "num_outputs is True. Expected a whole number."
    assert refusal(style_bias=True) == "style_bias is True. Expected a number."


def test_half_a_character_is_no_text() -> None:
    """JSON can spell it; no tokenizer reads it."""
    with pytest.raises(RequestError, match=r"^prompt has half a character in it\. Expected text\.$"):
        Request("a \ud800 dog")
