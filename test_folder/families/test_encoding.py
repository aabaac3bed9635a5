"""Images and prompts are encoded as diffusers does."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.tokenizers import clip_tokenizer
from klora.errors import RequestError
from klora.form.request import Request
from klora.models.family import Family
from klora.models.prompts import pieces
from test_folder.families.painting import PROMPT, paint, photo, pixels_of, reconstruction


def test_encoded_images_are_the_posterior_as_the_denoiser_scales_it(model: Family) -> None:
    vae, pixels = model.pipe.vae, pixels_of(photo(64, 32))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        seen = model.encode_images(pixels)
    shift = vae.config.shift_factor or 0.0
    assert seen.mean.shape == (1, vae.config.latent_channels, 4, 8)
    assert torch.equal(seen.mean, (posterior.mean - shift) * vae.config.scaling_factor)
    assert torch.equal(seen.std, posterior.std * vae.config.scaling_factor)


def test_decoding_encoded_images_gives_the_vaes_own_reconstruction(model: Family) -> None:
    vae = model.pipe.vae
    with torch.no_grad():
        latents = model.encode_images(pixels_of(photo())).mean
        decoded = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    torch.testing.assert_close(decoded, reconstruction(model, photo()), rtol=1e-4, atol=1e-5)


def test_prompt_is_encoded_as_the_pipeline_does(model: Family) -> None:
    length = {"unet": 77, "transformer": 512 if model.guidance_scale else 256}[model.component]
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with torch.no_grad():
        seen = model.encode_prompt([PROMPT, "a cat"])
        options = {} if model.component == "unet" else {"prompt_2": None, "max_sequence_length": length}
        meant = model.pipe.encode_prompt([PROMPT, "a cat"], **options)
    width = 64 if model.component == "unet" else 32
    assert seen["prompt_embeds"].shape == (2, length, width)
    assert seen["pooled_prompt_embeds"].shape == (2, 32)
    assert torch.equal(seen[names[0]], meant[0])
    assert torch.equal(seen[names[1]], meant[2 if model.component == "unet" else 1])
    assert not torch.equal(seen["prompt_embeds"][0], seen["prompt_embeds"][1])


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def in_rows(tokenizer: Any, ids: list[int], rows: int) -> Tensor:
    """Token ids as CLIP wants them: 75 in a row, the beginning before them, the end and padding behind."""
    room = tokenizer.model_max_length - 2
    pieces = [ids[row * room : (row + 1) * room] for row in range(rows)]
    ends = [[tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (room - len(piece)) for piece in pieces]
    return torch.tensor([[tokenizer.bos_token_id, *piece, *end] for piece, end in zip(pieces, ends, strict=True)])


def test_a_long_prompt_of_sdxl_is_read_in_rows_of_75_tokens(sdxl: Family) -> None:
    """Against both encoders themselves; "dog" is one token."""
    long, short = " ".join(["dog"] * 100 + ["castle"] * 60), "a cat"
    seen = sdxl.encode_prompt([long, short], ["rain", "rain"])
    states, pooled = [], None
    for component, encoder in sdxl.text_encoders.items():
        tokenizer = getattr(sdxl.pipe, component.replace("text_encoder", "tokenizer"))
        ids = ids_of(tokenizer, long)
        rows = -(-len(ids) // 75)
        assert rows == 3 and len(ids_of(tokenizer, "dog")) == len(ids_of(tokenizer, "castle")) == 1
        with torch.no_grad():
            told = [
                encoder(in_rows(tokenizer, i, rows), output_hidden_states=True) for i in (ids, ids_of(tokenizer, short))
            ]
        states.append(torch.stack([one.hidden_states[-2].flatten(0, 1) for one in told]))
        pooled = torch.stack([one[0][0] for one in told])
    torch.testing.assert_close(seen["prompt_embeds"], torch.cat(states, dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["pooled_prompt_embeds"], pooled, rtol=1e-4, atol=1e-5)
    alone = sdxl.encode_prompt([short], ["rain"])
    assert seen["negative_prompt_embeds"].shape == (2, 3 * 77, 64)
    rows = {"prompt_embeds": seen["prompt_embeds"][1:, :77]}
    rows["negative_pooled_prompt_embeds"] = seen["negative_pooled_prompt_embeds"][1:]
    for name, row in rows.items():
        torch.testing.assert_close(row, alone[name], rtol=1e-4, atol=1e-5)


def test_what_sdxl_is_asked_for_last_is_in_the_image(sdxl: Family) -> None:
    first = "a photo of " + "a dog and " * 40
    images = [paint(sdxl, prompt=first + last) for last in ("a cat", "a castle")]
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize(("base", "most"), [("sdxl", 600), ("flux-dev", 511), ("flux-schnell", 255)])
def test_more_than_a_base_reads_is_refused(models: dict[str, Family], base: str, most: int) -> None:
    models[base].encode_prompt(["dog " * most])
    with pytest.raises(
        RequestError, match=rf"^The prompt 'dog dog .*'\.\.\. has {most + 1} tokens\. Expected at most {most}"
    ):
        models[base].encode_prompt(["dog " * (most + 1)])


TEXT = st.text(alphabet="ab ,.!?日本語é😀👩\u200d🚀\n\t<>w0", max_size=300)


@given(text=TEXT)
@example(text="x" * 400)
@example(text="日本語" * 40)
@settings(max_examples=200)
def test_pieces_of_a_prompt_are_the_prompt_and_fit(text: str) -> None:
    tokenizer = clip_tokenizer("dog castle", "!")
    try:
        found = pieces(tokenizer, text)
    except RequestError:
        assert len(ids_of(tokenizer, text)) > 8 * 75
        return
    assert "".join(found) == text
    assert all(len(ids_of(tokenizer, piece)) <= 75 for piece in found)
    assert len(found) == 1 or len(ids_of(tokenizer, text)) > 75


def test_a_prompt_is_cut_between_words() -> None:
    tokenizer = clip_tokenizer("dog castle", "!")
    found = pieces(tokenizer, "dog " * 70 + "superlative castle")
    assert [piece.split()[-1] for piece in found] == ["dog", "castle"]
    assert pieces(tokenizer, "dog " * 75) == ["dog " * 75]


def test_negative_prompt_changes_what_sdxl_steers_away_from_and_nothing_else(sdxl: Family) -> None:
    request = Request(PROMPT, num_inference_steps=4, seed=0)
    with torch.no_grad():
        plain, steered = (sdxl.encode_prompt([PROMPT], negative) for negative in (None, ["a cat"]))
        before, after = (np.asarray(sdxl.sample(c, request, lambda _: None)[0], int) for c in (plain, steered))
    changed = {name for name in plain if not torch.equal(plain[name], steered[name])}
    assert changed == {"negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    assert np.abs(after - before).mean() > 1
