"""Words that call a LoRA: what its file states, else what its authority says, added where the prompt lacks them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from klora.cache import Borrowed
from klora.files.report import stated_triggers
from klora.form.request import Request
from klora.studio import Studio

SAID = ("zork style", "sks")
CLIPS = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def studio(bases: Path) -> Studio:
    return Studio(lambda *_: ("sdxl", "sdxl", bases / "sdxl"), Path("no-checker"), torch.device("cpu"))


@pytest.fixture
def lora(loras: Path, tmp_path: Path) -> Path:
    """A file that names no word."""
    path = tmp_path / "oil.safetensors"
    path.write_bytes((loras / "sdxl_style.safetensors").read_bytes())
    return path


def drawn(
    studio: Studio, lora: Path, prompt: str, said: tuple[str, ...] = SAID, **given: Any
) -> tuple[np.ndarray, Any]:
    """The image, and which words were added."""
    facts: dict[str, Any] = {}
    request = Request(prompt, num_inference_steps=2, seed=1, disable_safety_checker=True, **given)
    files = {"style_lora": Borrowed(lora, lora.with_suffix(".json"), said)}
    images = studio.make(request, files, facts.__setitem__)
    return np.asarray(images[0]), facts.get("triggers_added")


def test_the_first_word_is_added_where_the_prompt_has_none(studio: Studio, lora: Path) -> None:
    image, added = drawn(studio, lora, "a dog")
    assert added == "zork style"
    assert np.array_equal(image, drawn(studio, lora, "zork style, a dog", ())[0])
    assert not np.array_equal(image, drawn(studio, lora, "a dog", ())[0])


@pytest.mark.parametrize("prompt", ["a dog, Zork Style", "a sks dog"])
def test_any_of_them_suffices(studio: Studio, lora: Path, prompt: str) -> None:
    image, added = drawn(studio, lora, prompt)
    assert added is None
    assert np.array_equal(image, drawn(studio, lora, prompt, ())[0])


@pytest.mark.parametrize(("prompt", "added"), [("a husksy dog", "zork style"), ("zork, husksy", None)])
def test_a_part_of_a_word_is_none_of_them(studio: Studio, lora: Path, prompt: str, added: str | None) -> None:
    assert drawn(studio, lora, prompt, ("zork style", "sks") if added else ("sks", "zork"))[1] == added


def test_none_is_added_when_none_shall_be(studio: Studio, lora: Path) -> None:
    assert drawn(studio, lora, "a dog", add_triggers=False)[1] is None
    assert drawn(studio, lora, "a dog", fusion="sum", style_scale=0.5)[1] == "zork style"


@pytest.mark.parametrize(("fusion", "added"), [("content", "sks"), ("style", "zork style"), ("sum", "sks, zork style")])
def test_a_lora_that_does_not_act_adds_no_word(studio: Studio, lora: Path, fusion: str, added: str) -> None:
    called = {"content_lora": "sks", "style_lora": "zork style"}
    files = {name: Borrowed(lora, triggers=(word,)) for name, word in called.items()}
    facts: dict[str, Any] = {}
    request = Request("a dog", num_inference_steps=1, disable_safety_checker=True, fusion=fusion)
    studio.make(request, files, facts.__setitem__)
    assert facts["triggers_added"] == added


@pytest.mark.parametrize("key", ["trigger", "modelspec.trigger_phrase", "ss_trigger", "instance_prompt"])
def test_what_the_file_states_goes_before_what_others_say_and_is_what_inspect_shows(
    studio: Studio, lora: Path, key: str
) -> None:
    save_file(load_file(lora), lora, {key: "a photo of own, ", "ss_tag_frequency": '{"1_x": {"a tag": 9}}'})
    image, added = drawn(studio, lora, "a dog")
    assert added == "a photo of own" == stated_triggers(safe_open(lora, "pt").metadata())[0]
    assert np.array_equal(image, drawn(studio, lora, "a photo of own, a dog", add_triggers=False)[0])
    assert drawn(studio, lora, "A photo of own by the sea")[1] is None


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ({"1_ohwx man": {"ohwx man": 1}}, "ohwx man"),
        ({"1_ohwx": {"ohwx": 3}, "2_ohwx": {"ohwx": 3}}, "zork style"),
        ({"1_ohwx": {"ohwx": 1, "a hat": 1}}, "zork style"),
        ({"1_ohwx": {"ohwx man": 1}}, "zork style"),
        ({"ohwx": {"ohwx": 1}}, "zork style"),
        ({'1_o"x': {'o"x': 1}}, "zork style"),
    ],
)
def test_the_only_tag_of_pictures_that_are_called_by_it_is_the_trigger(
    studio: Studio, lora: Path, tags: dict[str, dict[str, int]], word: str
) -> None:
    """As ai-toolkit writes it."""
    save_file(load_file(lora), lora, {"ss_tag_frequency": json.dumps(tags)})
    assert drawn(studio, lora, "a dog", SAID)[1] == word


def test_tags_of_captions_are_no_trigger(studio: Studio, lora: Path) -> None:
    save_file(load_file(lora), lora, {"ss_tag_frequency": '{"1_x": {"a tag": 9}}'})
    assert [drawn(studio, lora, "a dog", said)[1] for said in (SAID, ())] == ["zork style", None]


@pytest.mark.parametrize(("prompt", "added"), [("a tok dog", "TOK"), ("a TOK dog", None), ("style:TOK", None)])
def test_a_word_that_the_lora_teaches_is_there_as_it_is_spelled_or_not_at_all(
    studio: Studio, lora: Path, prompt: str, added: str | None
) -> None:
    words = {f"bundle_emb.TOK.{encoder}": torch.ones(2, 32) for encoder in CLIPS}
    save_file(load_file(lora) | words, lora, {"trigger": "TOK"})
    image, seen = drawn(studio, lora, prompt)
    assert seen == added
    assert not np.array_equal(image, drawn(studio, lora, prompt.replace("TOK", "tok"), add_triggers=False)[0])


@pytest.mark.parametrize(
    ("prompt", "added"), [("a <s0><s1> icon", None), ("an icon, <s1>", None), ("an icon", "an icon of <s0><s1>")]
)
def test_a_phrase_is_not_added_where_the_prompt_has_a_word_that_the_lora_teaches(
    studio: Studio, lora: Path, prompt: str, added: str | None
) -> None:
    """As a card of the advanced trainer's says it, with the words in it."""
    words = {f"bundle_emb.{word}.{encoder}": torch.ones(1, 32) for word in ("<s0>", "<s1>") for encoder in CLIPS}
    save_file(load_file(lora) | words, lora)
    assert drawn(studio, lora, prompt, ("an icon of <s0><s1>",))[1] == added


def test_what_one_page_says_is_not_said_of_the_same_file_elsewhere(studio: Studio, lora: Path) -> None:
    """The file is kept in memory by its bytes, its words are not."""
    for said, added in ((SAID, "zork style"), (("other",), "other"), ((), None)):
        assert drawn(studio, lora, "a dog", said)[1] == added
