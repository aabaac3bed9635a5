"""Words that LoRA files teach: prompts read as with diffusers' textual inversion, and the base forgets them again."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klora.errors import RequestError
from klora.form.request import Request
from klora.generation import generate
from klora.generation.words import _replaced, taught
from klora.lora import LoRA
from klora.models import load_model
from klora.models.family import Family
from test_folder.files.reading import GOOD, GOOD_FLUX, read
from test_folder.variants import cog_sdxl, embeddings


def of(model: Family) -> Mapping[str, Tensor]:
    return embeddings(model, "text_encoder", "text_encoder_2")


def test_a_prompt_reads_as_with_diffusers_textual_inversion(model: Family) -> None:
    vectors = of(model)
    with torch.no_grad(), taught(model.pipe, {"zork": vectors}) as spoken:
        seen = model.encode_prompt([spoken("a photo of zork, red")])
    pipe = type(model.pipe).from_pretrained(model.pipe.config._name_or_path)
    pipe.load_textual_inversion(vectors["text_encoder"], "zork", pipe.tokenizer, pipe.text_encoder)
    if model.component == "unet":
        pipe.load_textual_inversion(vectors["text_encoder_2"], "zork", pipe.tokenizer_2, pipe.text_encoder_2)
        embeds, _, pooled, _ = pipe.encode_prompt("a photo of zork, red")
        meant = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:  # it cannot teach T5
        meant = {"pooled_prompt_embeds": pipe._get_clip_prompt_embeds("a photo of zork, red")}
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        if name in meant:
            torch.testing.assert_close(seen[name], meant[name])


def test_every_encoder_is_taught_and_forgets(model: Family) -> None:
    prompt = ["a photo of zork"]
    with torch.no_grad():
        before = model.encode_prompt(prompt)
        tables = {name: encoder.get_input_embeddings() for name, encoder in model.text_encoders.items()}
        tokenizers = (model.pipe.tokenizer, len(model.pipe.tokenizer), model.pipe.tokenizer_2)
        with pytest.raises(KeyboardInterrupt), taught(model.pipe, {"zork": of(model)}) as spoken:
            during = model.encode_prompt([spoken(prompt[0])])
            raise KeyboardInterrupt
        after = model.encode_prompt(prompt)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(before[name], after[name]) and not torch.equal(before[name], during[name])
    assert tokenizers == (model.pipe.tokenizer, len(model.pipe.tokenizer), model.pipe.tokenizer_2)
    for name, table in tables.items():
        assert model.text_encoders[name].get_input_embeddings() is table


def test_a_word_is_as_many_tokens_as_the_encoder_has_vectors_that_has_most(model: Family) -> None:
    first, second = of(model).values()
    with taught(model.pipe, {"zork": {"text_encoder": first[:1], "text_encoder_2": second}}) as spoken:
        assert spoken("zork") == "<klora0-0> <klora0-1>"
        assert torch.equal(model.text_encoders["text_encoder_2"].get_input_embeddings().weight[-2:], second)


def test_without_words_nothing_is_copied(model: Family) -> None:
    before = model.pipe.tokenizer, model.pipe.tokenizer_2
    with taught(model.pipe, {}) as spoken:
        assert (model.pipe.tokenizer, model.pipe.tokenizer_2) == before
        assert spoken("a dog") == "a dog"


def test_an_encoder_may_have_more_rows_than_words(bases: Path) -> None:
    """As the published T5 has."""
    flux = load_model("flux", bases / "flux-dev", torch.device("cpu"))
    table = flux.pipe.text_encoder_2.resize_token_embeddings(len(flux.pipe.tokenizer_2) + 28)
    with torch.no_grad(), taught(flux.pipe, {"zork": of(flux)}) as spoken:
        assert spoken("zork") == "<klora0-0> <klora0-1>"
        assert flux.pipe.text_encoder_2.get_input_embeddings().weight.shape == table.weight.shape
        flux.encode_prompt([spoken("a photo of zork")])


@pytest.mark.parametrize("prompt", ["a photo of TOK", "a photo of <s0><s1>", "a photo of content:TOK"])
def test_a_cog_sdxl_tars_words_act_in_a_request(models: dict[str, Family], tmp_path: Path, prompt: str) -> None:
    sdxl = models["sdxl"]
    lora = sdxl.read_lora(cog_sdxl(sdxl, tmp_path)[0])
    images = [
        generate(sdxl, Request(words, num_inference_steps=1, seed=0), content=file)[0].tobytes()
        for words, file in ((prompt, lora), ("a photo of content:TOK", lora), (prompt, LoRA(lora.layers)))
    ]
    assert images[0] == images[1] != images[2]


def test_a_word_that_both_teach_must_say_whose_it_is(models: dict[str, Family], tmp_path: Path) -> None:
    sdxl = models["sdxl"]
    lora = sdxl.read_lora(cog_sdxl(sdxl, tmp_path)[0])
    with pytest.raises(RequestError, match="content:TOK or style:TOK"):
        generate(sdxl, Request("a TOK", num_inference_steps=1), content=lora, style=lora)
    with pytest.raises(RequestError, match="content:TOK or style:TOK"):
        generate(sdxl, Request("a toy", negative_prompt="TOK", num_inference_steps=1), content=lora, style=lora)
    assert generate(sdxl, Request("a content:TOK in style:TOK", num_inference_steps=1), content=lora, style=lora)

    with pytest.raises(RequestError, match="content:TOK or style:TOK"):
        generate(sdxl, Request("a photo of:TOK", num_inference_steps=1), content=lora, style=lora)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("content:TOK, style:TOK", "x y, style:TOK"),  # where the style LoRA does not act
        ("a TOK in of:TOK, TOKEN", "a x y in of:x y, TOKEN"),
        ("TOKs and 0", "z and w"),
        ("TOK-0", "x y-w"),
    ],
)
def test_all_words_are_replaced_at_once_and_another_loras_stay(model: Family, prompt: str, read: str) -> None:
    """What stands for a word may hold another: "<klora0-0>" a taught "0"."""
    tokens = {"TOK": ["x", "y"], "content:TOK": ["x", "y"], "TOKs": ["z"], "0": ["w"], "x": ["0"]}
    assert _replaced(prompt, tokens) == read


def test_a_bundled_embedding_is_read(model: Family, tmp_path: Path) -> None:
    second = {"unet": "clip_g", "transformer": "t5"}[model.component]
    vectors = embeddings(model, "bundle_emb.zork.clip_l", f"bundle_emb.zork.{second}")
    lora = read(model, tmp_path / "x.safetensors", vectors | (GOOD if model.component == "unet" else GOOD_FLUX))
    meant = dict(zip(("text_encoder", "text_encoder_2"), vectors.values(), strict=True))
    assert lora.words.keys() == {"zork"} and lora.words["zork"].keys() == meant.keys()
    assert all(torch.equal(lora.words["zork"][part], vector) for part, vector in meant.items())
