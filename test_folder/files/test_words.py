"""Words that LoRA files teach: prompts read as with diffusers' textual inversion, and the base forgets them again."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError, RequestError
from klora.form.request import Request
from klora.generation import generate
from klora.generation.words import _replaced, teaching
from klora.lora import LoRA
from klora.models import load_model
from klora.models.family import Family
from test_folder.files.reading import GOOD, GOOD_FLUX, read
from test_folder.variants import cog_sdxl, embeddings


def of(model: Family) -> Mapping[str, Tensor]:
    return embeddings(model, "text_encoder", "text_encoder_2")


def test_a_prompt_reads_as_with_diffusers_textual_inversion(model: Family) -> None:
    vectors = of(model)
    with torch.no_grad(), teaching(model.pipe, {"zork": vectors}) as with_tokens:
        seen = model.encode_prompt([with_tokens("a photo of zork, red")])
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
        with pytest.raises(KeyboardInterrupt), teaching(model.pipe, {"zork": of(model)}) as with_tokens:
            during = model.encode_prompt([with_tokens(prompt[0])])
            raise KeyboardInterrupt
        after = model.encode_prompt(prompt)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(before[name], after[name]) and not torch.equal(before[name], during[name])
    assert tokenizers == (model.pipe.tokenizer, len(model.pipe.tokenizer), model.pipe.tokenizer_2)
    for name, table in tables.items():
        assert model.text_encoders[name].get_input_embeddings() is table


def test_a_word_is_as_many_tokens_as_the_encoder_has_vectors_that_has_most(model: Family) -> None:
    first, second = of(model).values()
    with teaching(model.pipe, {"zork": {"text_encoder": first[:1], "text_encoder_2": second}}) as with_tokens:
        assert with_tokens("zork") == "<klora0-0> <klora0-1>"
        assert torch.equal(model.text_encoders["text_encoder_2"].get_input_embeddings().weight[-2:], second)


def made_of(model: Family, prompt: str) -> dict[str, Tensor]:
    """What each text encoder makes of a prompt."""
    read = model.encode_prompt([prompt])
    if model.component == "transformer":
        return {"text_encoder": read["pooled_prompt_embeds"], "text_encoder_2": read["prompt_embeds"]}
    width = model.pipe.text_encoder.config.hidden_size
    return {"text_encoder": read["prompt_embeds"][..., :width], "text_encoder_2": read["prompt_embeds"][..., width:]}


@pytest.mark.parametrize("lacking", ["text_encoder", "text_encoder_2"])
def test_an_encoder_without_vectors_for_a_word_reads_it_as_text(model: Family, lacking: str) -> None:
    """As T5 did where CLIP alone was taught, which is the advanced trainer's default on FLUX.1."""
    vectors = {part: own for part, own in of(model).items() if part != lacking}
    table = model.text_encoders[lacking].get_input_embeddings()
    with torch.no_grad():
        plain = made_of(model, "a photo of <s0>, red")
        with teaching(model.pipe, {"<s0>": vectors, "content:<s0>": vectors}) as with_tokens:
            read = [made_of(model, with_tokens(f"a photo of {word}, red")) for word in ("<s0>", "content:<s0>")]
            assert model.text_encoders[lacking].get_input_embeddings() is table
        after = made_of(model, "a photo of <s0>, red")
    for part, meant in plain.items():
        assert torch.equal(after[part], meant)
        assert [torch.equal(seen[part], meant) for seen in read] == [part == lacking] * 2


def test_without_words_nothing_is_copied(model: Family) -> None:
    before = model.pipe.tokenizer, model.pipe.tokenizer_2
    with teaching(model.pipe, {}) as with_tokens:
        assert (model.pipe.tokenizer, model.pipe.tokenizer_2) == before
        assert with_tokens("a dog") == "a dog"


def test_an_encoder_may_have_more_rows_than_words(bases: Path) -> None:
    """As the published T5 has."""
    flux = load_model("flux", bases / "flux-dev", torch.device("cpu"))
    table = flux.pipe.text_encoder_2.resize_token_embeddings(len(flux.pipe.tokenizer_2) + 28)
    with torch.no_grad(), teaching(flux.pipe, {"zork": of(flux)}) as with_tokens:
        assert with_tokens("zork") == "<klora0-0> <klora0-1>"
        assert flux.pipe.text_encoder_2.get_input_embeddings().weight.shape == table.weight.shape
        flux.encode_prompt([with_tokens("a photo of zork")])


@pytest.mark.parametrize("where", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("prompt", ["a photo of TOK", "a photo of <s0><s1>", "a photo of content:TOK"])
def test_a_cog_sdxl_tars_words_act_in_a_request(sdxl: Family, tmp_path: Path, prompt: str, where: str) -> None:
    lora = sdxl.read_lora(cog_sdxl(sdxl, tmp_path)[0])
    images = [
        generate(sdxl, Request(**{"prompt": "a toy", where: words}, num_inference_steps=1, seed=0), content=file)[0]
        for words, file in ((prompt, lora), ("a photo of content:TOK", lora), (prompt, LoRA(lora.layers)))
    ]
    assert images[0] == images[1] != images[2]


def beside(model: Family, folder: Path, name: str = "pytorch_lora_weights", words: str = "zork_emb") -> Path:
    """A LoRA with words beside it, as diffusers' advanced trainers leave them."""
    second = {"unet": "clip_g", "transformer": "t5"}[model.component]
    save_file(GOOD if model.component == "unet" else GOOD_FLUX, folder / f"{name}.safetensors")
    save_file(embeddings(model, "clip_l", second), folder / f"{words}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "words", "asked"),
    [
        ("pytorch_lora_weights", "zork_emb", ""),
        ("pytorch_lora_weights", "zork_emb", "pytorch_lora_weights.safetensors"),
        ("d[1]", "d[1]_emb", ""),
        ("d[1]", "d[1]_emb", "d[1].safetensors"),
    ],
)
def test_words_that_lie_beside_a_file_are_its_own(
    model: Family, tmp_path: Path, name: str, words: str, asked: str
) -> None:
    taught = model.read_lora(beside(model, tmp_path, name, words) / asked).words
    meant = of(model)
    assert taught.keys() == {"<s0><s1>", "<s0>", "<s1>"}
    for word, rows in {"<s0><s1>": slice(2), "<s0>": slice(1), "<s1>": slice(1, 2)}.items():
        assert taught[word].keys() == meant.keys()
        assert all(torch.equal(taught[word][part], vectors[rows]) for part, vectors in meant.items())


def test_words_in_a_tar_are_its_loras(model: Family, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    beside(model, tmp_path / "in")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    assert model.read_lora(tmp_path / "x.tar").words.keys() == {"<s0><s1>", "<s0>", "<s1>"}


@pytest.mark.parametrize("prompt", ["a photo of <s0><s1>", "a photo of <s0> <s1>"])
def test_words_that_lie_beside_a_file_act_as_a_cog_sdxl_tars(sdxl: Family, tmp_path: Path, prompt: str) -> None:
    lora, tar = sdxl.read_lora(beside(sdxl, tmp_path)), sdxl.read_lora(cog_sdxl(sdxl, tmp_path)[0])
    images = [
        generate(sdxl, Request(words, num_inference_steps=1, seed=0), content=LoRA(tar.layers, words=taught))[
            0
        ].tobytes()
        for words, taught in ((prompt, lora.words), ("a photo of TOK", tar.words), (prompt, {}))
    ]
    assert images[0] == images[1] != images[2]


def test_a_lora_that_is_only_called_as_if_it_held_words_is_left_alone(model: Family, tmp_path: Path) -> None:
    for name in ("dog", "dog_emb"):
        save_file(GOOD if model.component == "unet" else GOOD_FLUX, tmp_path / f"{name}.safetensors")
        assert not model.read_lora(tmp_path / f"{name}.safetensors").words
    beside(model, tmp_path, "cat", "cat_emb")
    assert not model.read_lora(tmp_path / "dog.safetensors").words


def test_the_words_of_two_beside_one_file_are_refused(model: Family, tmp_path: Path) -> None:
    for words in ("a_emb", "b_emb"):
        beside(model, tmp_path, words=words)
    with pytest.raises(LoRAError, match=r"pytorch_lora_weights.safetensors lies beside '._emb.safetensors' and '"):
        model.read_lora(tmp_path / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("key", ["clip_l", "clip_g", "t5"])
def test_words_of_another_bases_width_are_refused(sdxl: Family, tmp_path: Path, key: str) -> None:
    save_file({key: torch.ones(2, 7)}, beside(sdxl, tmp_path) / "zork_emb.safetensors")
    with pytest.raises(LoRAError, match=rf"holds '{key}' of \[2, 7\]. Expected up to 64 vectors of "):
        sdxl.read_lora(tmp_path)


def test_a_word_may_have_as_many_vectors_as_is_said(sdxl: Family, tmp_path: Path) -> None:
    width = sdxl.pipe.text_encoder.config.hidden_size
    words = beside(sdxl, tmp_path) / "zork_emb.safetensors"
    for count in (1, 64):
        save_file({"clip_l": torch.ones(count, width)}, words)
        assert len(sdxl.read_lora(tmp_path).words) == (count + 1 if count > 1 else 1)
    odd = {
        "Expected up to 64 vectors": (torch.ones(65, width), torch.ones(0, width), torch.ones(1, 1, width)),
        "not finite": (torch.full((1, width), torch.inf), torch.ones(1, width, dtype=torch.int32)),
    }
    for complaint, vectors in odd.items():
        for tensor in vectors:
            save_file({"clip_l": tensor}, words)
            with pytest.raises(LoRAError, match=complaint):
                sdxl.read_lora(tmp_path)


def test_encoders_that_were_taught_different_numbers_of_tokens_are_refused(sdxl: Family, tmp_path: Path) -> None:
    vectors = embeddings(sdxl, "clip_l", "clip_g")
    save_file(vectors | {"clip_l": vectors["clip_l"][:1].clone()}, beside(sdxl, tmp_path) / "zork_emb.safetensors")
    with pytest.raises(LoRAError, match="Expected a token for each embedding"):
        sdxl.read_lora(tmp_path)


def test_tokens_that_both_teach_may_follow_one_another_after_whose_they_are(sdxl: Family, tmp_path: Path) -> None:
    lora = sdxl.read_lora(beside(sdxl, tmp_path))
    made = [
        generate(sdxl, Request(words, num_inference_steps=1, seed=0), content=lora, style=lora)[0].tobytes()
        for words in ("a content:<s0><s1> in style:<s0><s1>", "a content:<s0> content:<s1> in style:<s0> style:<s1>")
    ]
    assert made[0] == made[1]
    with pytest.raises(RequestError, match="content:<s1> or style:<s1>"):
        generate(sdxl, Request("a content:<s0> <s1>", num_inference_steps=1), content=lora, style=lora)


def test_a_word_that_both_teach_must_say_whose_it_is(sdxl: Family, tmp_path: Path) -> None:
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
