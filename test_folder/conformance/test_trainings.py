"""Trainings: a zip in, a LoRA out that the predictor takes. The one file of the suite that trains."""

import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from in_venv import ROOT
from safetensors.numpy import load

from test_folder.conformance.client import BASES, Client, progress
from test_folder.conformance.hooks import Hooks
from test_folder.conformance.local import Place, trains_alone
from test_folder.conformance.payloads import content_of, data_uri, encoded, noise, pictures, pixels_of, upload, zipped

TOKEN = "hf_CanaryOfTheHub"
LEFT = ROOT / "trained_model.tar"  # where `cog train` on a laptop finds it
LEARNING = {"steps": 8, "learning_rate": 0.01, "lora_rank": 4, "sample_steps": 2, "gradient_checkpointing": "auto"}
FILES = {
    "README.md", "config.json", "contact_sheet.png", "lora.safetensors", "lora_kohya.safetensors", "run.safetensors",
    "train.jsonl",
}  # fmt: skip


def trained(trainer: Client, **inputs: Any) -> dict[str, Any]:
    return trainer.succeeded(**trainer.mode.quick | inputs)


def weights_of(answer: dict[str, Any]) -> bytes:
    return content_of(answer["output"]["weights"])[1]


def opened(tar: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(tar))


# What comes out.


@pytest.fixture(scope="module")
def quick(trainer: Client) -> dict[str, Any]:
    """The answer to a quick training on a server that has not been asked for much. It was given a token."""
    return trained(trainer, hf_token=TOKEN)


@pytest.fixture(scope="module")
def loss(quick: dict[str, Any]) -> float:
    return quick["metrics"]["fixed_loss"]


@pytest.mark.parametrize("base", BASES)
def test_a_zip_becomes_a_lora_that_the_predictor_fuses(trainer: Client, predictor: Client, base: str) -> None:
    described = [*pictures(5), ("caption.csv", b"caption,image_file\na red sbu,red.png\n"), ("notes.doc", b"?")]
    answer = trained(trainer, input_images=upload(*described), base_model=base, **LEARNING)
    assert "5 pictures" in answer["logs"]
    assert "skipped notes.doc" in answer["logs"]
    assert answer["metrics"]["loss"] > 0
    with opened(tar := weights_of(answer)) as files:
        names = files.getnames()
        assert {name for name in names if not name.startswith("samples")} == FILES
        assert len([name for name in names if name.startswith("samples/step_000008_")]) == 4
        facts = json.load(files.extractfile("config.json"))
        assert (facts["base"], facts["trigger"]) == (base, "sbu")
        assert len(files.extractfile("train.jsonl").readlines()) == 1 + LEARNING["steps"]
        assert_lora_of(LEARNING["lora_rank"], load(files.extractfile("lora.safetensors").read()))
    lora, quick = data_uri(tar, "application/x-tar"), predictor.mode.quick
    bare = predictor.images(**quick, model=base)[0]
    alone = predictor.succeeded(**quick, content_lora=lora)
    named = predictor.images(**quick | {"prompt": f"sbu, {quick['prompt']}"}, content_lora=lora)[0]
    fused = predictor.succeeded(**quick, content_lora=lora, style_lora=lora, add_triggers=False)
    assert alone["metrics"]["triggers_added"] == "sbu"
    assert np.array_equal(pixels_of(alone["output"][0]), named)
    assert not np.array_equal(bare, named)
    assert "triggers_added" not in fused["metrics"]


def assert_lora_of(rank: int, tensors: Mapping[str, np.ndarray]) -> None:
    down = {key.removesuffix(".lora_A.weight"): tensor for key, tensor in tensors.items() if ".lora_A." in key}
    up = {key.removesuffix(".lora_B.weight"): tensor for key, tensor in tensors.items() if ".lora_B." in key}
    assert down.keys() == up.keys() != set()
    assert {tensor.shape[0] for tensor in down.values()} == {tensor.shape[1] for tensor in up.values()} == {rank}
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_the_log_and_the_webhooks_tell_how_far_it_is(trainer: Client, hooks: Hooks) -> None:
    trainer.post(trainer.mode.quick | {"steps": 4}, {"Prefer": "respond-async"}, webhook=f"{hooks.url}/training")
    end = hooks.end("training")
    assert end["status"] == "succeeded"
    assert progress(end["logs"])[-1] == (100, 4, 4)
    assert "\r" not in end["logs"]  # no bars of libraries, which end no line
    assert {"loss", "fixed_loss", "steps_per_second", "predict_time"} <= end["metrics"].keys()
    assert end["output"]["weights"]
    assert any(event["status"] == "processing" and progress(event["logs"]) for event in hooks.events("training"))


def test_the_same_seed_and_pictures_give_the_same_lora_however_they_come(
    trainer: Client, hooks: Hooks, loss: float
) -> None:
    """By value, in another order by address, in a tar."""
    files = pictures()
    by_address = trained(trainer, input_images=hooks.give("pictures.zip", zipped(*files[::-1])))
    in_a_tar = trained(trainer, input_images=data_uri(tarred(files), "application/x-tar"))
    assert [answer["metrics"]["fixed_loss"] for answer in (by_address, in_a_tar)] == [loss, loss]
    assert trained(trainer, seed=4)["metrics"]["fixed_loss"] != loss


def tarred(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_large_zip_comes_by_address(trainer: Client, hooks: Hooks) -> None:
    """30 MB, none of it padding."""
    archive = zipped(*((f"{seed}.png", encoded(noise((1024, 1024), seed))) for seed in range(10)))
    assert len(archive) > 30e6
    answer = trained(trainer, input_images=hooks.give("large.zip", archive, "application/zip"))
    assert "10 pictures" in answer["logs"]


# What is refused.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"input_images": upload(("notes.txt", b"no picture"))}, "input_images has no usable picture"),
    "blank": ({"input_images": ""}, "input_images is ''. Expected an uploaded file"),
    "no archive": ({"input_images": "data:application/zip;base64,AAAA"}, "input_images is no archive"),
    "empty zip": ({"input_images": upload()}, "input_images has no usable picture"),
    "names that lead out": ({"input_images": upload(("../../a.png", pictures()[0][1]))}, "leads out of the upload"),
    "damaged picture": ({"input_images": upload(("a.png", pictures()[0][1][:-30]))}, "'a.png' cannot be decoded"),
    "small picture": ({"input_images": upload(("a.png", encoded(noise((16, 16), 0))))}, "smaller than 64"),
    "cut zip": ({"input_images": data_uri(zipped(*pictures())[:-40], "application/zip")}, "input_images"),
    "resolution": ({"resolution": "big"}, "resolution is 'big'"),
    "no tar": ({"resume_from": upload(("a", b"b"))}, "resume_from"),
    "no token": ({"hf_repo_id": "me/dog"}, "hf_token is not given"),
    "no layer": ({"layers_to_optimize_regex": "nowhere"}, "names no linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(trainer: Client, loss: float, case: str) -> None:
    inputs, message = REFUSED[case]
    said = trainer.refusal(**trainer.mode.quick | inputs)
    assert message in said
    assert "\n" not in said and "Traceback" not in said and said.endswith(".")


def test_after_all_these_refusals_and_an_upload_that_cannot_be_had_it_trains_as_before(
    trainer: Client, hooks: Hooks, loss: float
) -> None:
    for inputs, _ in REFUSED.values():
        trainer.refusal(**trainer.mode.quick | inputs)
    error = trainer.error(**trainer.mode.quick | {"input_images": f"{hooks.url}/nothing.zip"})
    assert error.startswith("Input validation error: ") and "404" in error
    assert trained(trainer)["metrics"]["fixed_loss"] == loss


@pytest.mark.local
def test_mask_prompts_need_a_segmenter(trainer: Client) -> None:
    """Tiny bases have none."""
    said = trainer.refusal(**trainer.mode.quick, mask_mode="clipseg", mask_prompt="dog")
    assert "segmenter is not installed" in said


@pytest.mark.local
def test_a_tracker_needs_its_library(trainer: Client) -> None:
    """Which the image has."""
    said = trainer.refusal(**trainer.mode.quick, wandb_api_key="k3y")
    assert "wandb is not installed" in said and "k3y" not in said


# Cancellation.


def test_a_cancelled_training_leaves_the_next_one_right(trainer: Client, hooks: Hooks, loss: float) -> None:
    trainer.begin("cancelled", webhook=f"{hooks.url}/cancelled-training", webhook_events_filter=["completed"])
    assert trainer.cancel("cancelled") == 200
    assert hooks.end("cancelled-training")["status"] == "canceled"
    trainer.wait_until_ready()
    assert trained(trainer)["metrics"]["fixed_loss"] == loss


@pytest.mark.local
def test_a_cancelled_training_goes_on_from_its_tar_as_if_nothing_had_been(trainer: Client) -> None:
    with trains_alone():
        LEFT.unlink(missing_ok=True)
        trainer.begin("to-go-on")
        assert trainer.cancel("to-go-on") == 200
        trainer.wait_for(LEFT.is_file)
        left = LEFT.read_bytes()
    with opened(left) as tar:
        assert {"config.json", "train.jsonl"} <= set(tar.getnames())
        state = tar.extractfile("run.safetensors").read()
    header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
    done = json.loads(header["__metadata__"]["run"])["step"]
    resumed = trained(trainer, steps=done + 5, resume_from=data_uri(left, "application/x-tar"))
    whole = trained(trainer, steps=done + 5)
    assert [progress(answer["logs"])[0][1] for answer in (resumed, whole)] == [done + 1, 0]
    assert resumed["metrics"]["fixed_loss"] == whole["metrics"]["fixed_loss"]


# What is left behind.


@pytest.mark.local
def test_trainings_leave_no_files_however_they_end(trainer: Client, training_place: Place) -> None:
    before = training_place.files()
    trained(trainer)
    trainer.refusal(**trainer.mode.faulty)
    trainer.begin("leaves-nothing")
    trainer.cancel("leaves-nothing")
    trainer.wait_until_ready()
    assert training_place.files() == before


def test_a_training_holds_no_token(quick: dict[str, Any]) -> None:
    with opened(weights_of(quick)) as files:
        inside = [files.extractfile(member).read() for member in files if member.isfile()]
    assert TOKEN not in json.dumps({name: value for name, value in quick.items() if name != "output"})
    assert not [content for content in inside if TOKEN.encode() in content]
