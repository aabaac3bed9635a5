"""Predictions, one after the other: what comes out is what was asked for, whatever was asked before."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from test_folder.conformance.client import Client, progress
from test_folder.conformance.hooks import Hooks
from test_folder.conformance.payloads import content_of, data_uri, encoded, gradient, image_of, noise

PNG = data_uri(encoded(gradient()), "image/png")


def ask(predictor: Client, **inputs: Any) -> dict[str, Any]:
    return predictor.succeeded(**predictor.mode.quick | inputs)


def draw(predictor: Client, **inputs: Any) -> np.ndarray:
    """The one picture of a quick prediction."""
    [image] = predictor.images(**predictor.mode.quick | inputs)
    return image


def far(first: np.ndarray, second: np.ndarray) -> float:
    """How far two pictures are from each other: 0 to 255."""
    return float(np.abs(first.astype(float) - second).mean())


# What comes out.


@pytest.mark.parametrize(
    ("suffix", "kind", "mime"),
    [("webp", "WEBP", "image/webp"), ("jpg", "JPEG", "image/jpeg"), ("png", "PNG", "image/png")],
)
def test_an_image_has_the_format_that_was_asked_for(predictor: Client, suffix: str, kind: str, mime: str) -> None:
    [uri] = ask(predictor, output_format=suffix)["output"]
    assert content_of(uri)[0] == mime
    assert (image_of(uri).format, image_of(uri).size) == (kind, (64, 64))


def test_an_image_has_the_size_that_was_asked_for(predictor: Client) -> None:
    assert draw(predictor, width=96, height=64).shape == (64, 96, 3)


def test_the_answer_is_complete(predictor: Client) -> None:
    answer = ask(predictor)
    assert answer.keys() == {"id", "output", "logs", "metrics", "status"}
    assert answer["metrics"]["predict_time"] > 0


def test_the_metrics_tell_the_seed_and_where_time_went(predictor: Client) -> None:
    metrics = ask(predictor)["metrics"]
    phases = [metrics[f"{phase}_seconds"] for phase in ("fetch", "fuse", "encode", "denoise", "decode")]
    assert metrics["seed"] == 7
    assert all(seconds >= 0 for seconds in phases)
    assert sum(phases) <= metrics["predict_time"]


def test_the_log_has_progress_lines_as_clients_parse_them(predictor: Client) -> None:
    logs = ask(predictor, num_inference_steps=4)["logs"]
    assert progress(logs) == [(0, 0, 4), (25, 1, 4), (50, 2, 4), (75, 3, 4), (100, 4, 4)]
    assert "\r" not in logs and "\x1b" not in logs


# Seeds.


def test_a_seed_draws_the_same_image_again_and_another_seed_another(predictor: Client) -> None:
    first, other, again = (draw(predictor, seed=seed) for seed in (7, 8, 7))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [0, 4294967295])
def test_the_smallest_and_the_largest_seed_are_seeds(predictor: Client, seed: int) -> None:
    answers = [ask(predictor, seed=seed) for _ in range(2)]
    assert answers[0]["metrics"]["seed"] == seed
    assert np.array_equal(*(np.asarray(image_of(answer["output"][0])) for answer in answers))


def test_a_seed_that_was_chosen_is_reported_and_draws_the_same(predictor: Client) -> None:
    chosen = predictor.succeeded(**{name: value for name, value in predictor.mode.quick.items() if name != "seed"})
    seed = chosen["metrics"]["seed"]
    assert f"seed {seed}" in chosen["logs"]
    assert np.array_equal(draw(predictor, seed=seed), np.asarray(image_of(chosen["output"][0])))


def test_output_i_has_seed_plus_i(predictor: Client) -> None:
    """A batched product may round differently, so the measure is what another seed would change."""
    batch = predictor.images(**predictor.mode.quick, num_outputs=4)
    single = [draw(predictor, seed=7 + index) for index in range(4)]
    assert len(batch) == 4
    assert all(far(batch[i], single[i]) < far(batch[i], single[i - 1]) / 10 for i in range(4))


# Inputs as clients send them.


def test_a_whole_number_may_be_written_as_json_writes_a_float(predictor: Client) -> None:
    floats = {"num_inference_steps": 2.0, "seed": 7.0, "num_outputs": 1.0, "width": 64.0, "height": 64.0}
    assert np.array_equal(draw(predictor, **floats), draw(predictor))


def test_a_blank_field_is_one_that_was_not_filled_in(predictor: Client) -> None:
    """As web forms send it."""
    blank = {"content_lora": "", "style_lora": "", "negative_prompt": "", "hf_api_token": ""}
    assert np.array_equal(draw(predictor, **blank), draw(predictor))


def test_an_image_may_come_as_a_data_uri_or_by_address(predictor: Client, hooks: Hooks) -> None:
    picture = encoded(noise((64, 64), seed=1))
    change = {"prompt_strength": 0.5, "num_inference_steps": 4}
    by_value = draw(predictor, image=data_uri(picture, "image/png"), **change)
    by_address = draw(predictor, image=hooks.give("noise.png", picture, "image/png"), **change)
    assert np.array_equal(by_value, by_address)
    assert not np.array_equal(by_value, draw(predictor, image=PNG, **change))


def test_any_other_preference_is_none(predictor: Client) -> None:
    """Prefer: wait=5 is what Replicate's clients send; the answer comes when it is there."""
    status, answer = predictor.post(predictor.mode.quick, {"Prefer": "wait=5"})
    assert (status, answer["status"]) == (200, "succeeded")


def test_what_stands_beside_the_inputs_is_passed_over(predictor: Client) -> None:
    status, answer = predictor.post(predictor.mode.quick, version="1", created_at="2024-01-01T00:00:00Z")
    assert (status, answer["status"]) == (200, "succeeded")


def test_a_name_is_kept(predictor: Client) -> None:
    assert predictor.post(predictor.mode.quick, id="posted")[1]["id"] == "posted"
    assert predictor.put("put", predictor.mode.quick)[1]["id"] == "put"


def test_a_name_may_be_used_again_and_gives_the_same(predictor: Client) -> None:
    first, again = (predictor.put("same", predictor.mode.quick)[1] for _ in range(2))
    assert first["status"] == again["status"] == "succeeded"
    assert first["output"] == again["output"]


def test_names_of_our_own_are_all_different(predictor: Client) -> None:
    names = Counter(predictor.predict(**predictor.mode.faulty)["id"] for _ in range(5))
    assert set(names.values()) == {1}


# One request after another.


def test_requests_that_follow_each_other_closely_do_not_mix(predictor: Client) -> None:
    expected = {seed: draw(predictor, seed=seed).tobytes() for seed in (1, 2)}
    seeds = [1, 2, 2, 1] * 5
    assert [draw(predictor, seed=seed).tobytes() for seed in seeds] == [expected[seed] for seed in seeds]


OTHERS: list[dict[str, Any]] = [
    {"num_outputs": 2, "seed": 3},
    {"guidance_scale": 12, "width": 96, "num_inference_steps": 5},
    {"image": PNG, "prompt_strength": 0.9, "num_inference_steps": 3},
    {"image": PNG, "mask": data_uri(encoded(gradient().convert("L")), "image/png"), "num_inference_steps": 3},
    {"output_format": "jpg", "output_quality": 1, "prompt": "a red cat"},
    {"go_fast": True, "fusion": "sum"},
]


@pytest.mark.parametrize("other", OTHERS, ids=[" ".join(other) for other in OTHERS])
def test_what_one_request_asked_for_does_not_linger(predictor: Client, other: dict[str, Any]) -> None:
    before = draw(predictor)
    ask(predictor, **other)
    assert np.array_equal(draw(predictor), before)


# Requests that fail.

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "alias and name": (
        {"content_lora": "a.safetensors", "lora_weights": "b.safetensors"},
        ["lora_weights is an old name of content_lora"],
    ),
    "path outside": ({"content_lora": "../../etc/passwd"}, ["content_lora", "'..'"]),
    "no reference": ({"style_lora": "what is this"}, ["style_lora", "Expected"]),
    "no image": ({"image": "data:image/png;base64,AAAA"}, ["image", "PNG"]),
    "no address": ({"image": "ftp://127.0.0.1/a.png"}, ["image", "URL"]),
    "mask alone": ({"mask": PNG}, ["mask", "image"]),
    "size": ({"width": 100}, ["width is 100", "a multiple of"]),
    "no style": ({"fusion": "style"}, ["fusion", "style_lora"]),
    "ratio and size": ({"aspect_ratio": "1:1"}, ["aspect_ratio", "custom"]),
    "empty prompt": ({"prompt": " "}, ["prompt"]),
    "no step": ({"image": PNG, "prompt_strength": 0.1}, ["prompt_strength", "0.1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_fails_with_one_sentence_and_the_next_is_right(predictor: Client, case: str) -> None:
    inputs, parts = REFUSED[case]
    before = draw(predictor)
    said = predictor.refusal(**predictor.mode.quick | inputs)
    assert all(part in said for part in parts), said
    assert "\n" not in said and len(said) < 400 and said.endswith(".")
    assert np.array_equal(draw(predictor), before)


def test_an_upload_that_cannot_be_had_fails_and_the_next_is_right(predictor: Client, hooks: Hooks) -> None:
    """Cog fetches it, and says so in words of its own."""
    error = predictor.error(**predictor.mode.quick, image=f"{hooks.url}/nothing.png")
    assert error.startswith("Input validation error: ") and "404" in error
    assert draw(predictor).shape == (64, 64, 3)


def test_a_failure_that_nobody_foresaw_does_not_end_the_worker(predictor: Client) -> None:
    """The other mode's route calls the predictor with inputs that it does not have."""
    before = draw(predictor)
    status, answer = predictor.call("POST", "/trainings", {"input": {"input_images": PNG}})
    assert (status, answer["status"]) == (200, "failed")
    assert "TypeError" in answer["error"]
    assert np.array_equal(draw(predictor), before)
