"""Tokens: nothing that we write holds one. Cog itself repeats them to whoever asks again for a request that runs."""

import json
from typing import Any

import pytest

from test_folder.conformance.client import Client
from test_folder.conformance.hooks import Hooks
from test_folder.conformance.local import Place
from test_folder.conformance.payloads import content_of

CANARY = "Canary"
TOKENS = {
    "hf_api_token": "hf_CanaryOfTheHub",
    "civitai_api_token": "CanaryOfTheCivic",
    "replicate_api_token": "r8_CanaryOfTheReplica",
}
KEYS = {"hf_token": "hf_CanaryOfTheHub", "wandb_api_key": "CanaryOfTheWeights"}


def tells(answer: Any) -> bool:
    return CANARY in json.dumps(answer)


def test_an_answer_and_its_files_hold_no_token(predictor: Client) -> None:
    answer = predictor.succeeded(**predictor.mode.quick, **TOKENS)
    assert not tells(answer)
    assert CANARY.encode() not in content_of(answer["output"][0])[1]


def test_webhooks_hold_no_token(predictor: Client, hooks: Hooks) -> None:
    predictor.put("secret", predictor.mode.quick | TOKENS, {"Prefer": "respond-async"}, webhook=f"{hooks.url}/secret")
    assert hooks.end("secret")["status"] == "succeeded"
    assert not tells(hooks.events("secret"))


REFUSED = {
    "in a link": {"content_lora": "https://civitai.com/api/download/models/1?token=CanaryOfTheCivic"},
    "in the place of a reference": {"style_lora": "hf_CanaryOfTheHub"},
    "in a name": {"content_lora": "https://user:CanaryOfTheHub@huggingface.co/o/dog/resolve/main/dog.safetensors"},
    "beside something wrong": {"prompt": " "},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_holds_no_token(predictor: Client, case: str) -> None:
    answer = predictor.predict(**predictor.mode.quick | TOKENS | REFUSED[case])
    assert answer["status"] == "failed"
    assert not tells(answer)


def test_a_refusal_by_the_form_holds_no_token(predictor: Client) -> None:
    assert not tells(predictor.post(predictor.mode.quick | TOKENS | {"num_outputs": 9})[1])


def test_a_training_that_is_refused_holds_no_token(trainer: Client) -> None:
    answer = trainer.predict(**trainer.mode.faulty, **KEYS)
    assert trainer.mode.fault in answer["error"] and not tells(answer)
    assert not tells(trainer.predict(**trainer.mode.quick | {"hf_token": KEYS["hf_token"], "hf_repo_id": "no name"}))


def test_a_token_of_a_wrong_type_is_refused_without_it(predictor: Client) -> None:
    status, answer = predictor.post(predictor.mode.quick | {"hf_api_token": None})
    assert (status, answer["detail"][0]["loc"][-1]) == (422, "hf_api_token")


@pytest.mark.local
def test_the_server_keeps_no_token(predictor: Client, place: Place) -> None:
    """Neither its log nor any of its files, after what was right and what was wrong."""
    predictor.succeeded(**predictor.mode.quick, **TOKENS)
    for case in REFUSED.values():
        predictor.predict(**predictor.mode.quick | TOKENS | case)
    predictor.begin("kept")
    predictor.cancel("kept")
    kept = [path for path in place.folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert place.log.stat().st_size > 0
    assert kept == []
