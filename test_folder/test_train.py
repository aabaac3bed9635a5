"""A zip through Cog's real training server, and the LoRA that comes out through the predictor. Loopback only."""

import base64
import io
import json
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from test_folder.test_predict import QUICK, ROOT, Server, running

BASES = {"sdxl": "sdxl", "flux": "flux-dev"}
TINY = {"steps": 8, "learning_rate": 0.01, "lora_rank": 4, "seed": 3, "resolution": "64", "sample_steps": 2}
FILES = {
    "README.md", "config.json", "contact_sheet.png", "lora.safetensors", "lora_kohya.safetensors", "run.safetensors",
    "train.jsonl",
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("trainer"), {"KLORA_MODELS": str(bases)}, train=True) as server:
        yield server


def zipped(*files: tuple[str, bytes]) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files:
            archive.writestr(name, data)
    return "data:application/zip;base64," + base64.b64encode(buffer.getvalue()).decode()


def five_pictures() -> str:
    files = []
    for index, colour in enumerate(("red", "green", "blue", "white", "black")):
        buffer = io.BytesIO()
        Image.new("RGB", (96, 80), colour).save(buffer, "PNG")
        files.append((f"{index}.png", buffer.getvalue()))
    return zipped(*files, ("caption.csv", b"caption,image_file\na red sbu,0.png\n"), ("notes.doc", b"?"))


def image_of(answer: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["output"][0].partition(",")[2]))))


def trained(trainer: Server, **inputs: Any) -> dict[str, Any]:
    status, answer = trainer.call("POST", "/trainings", {"input": inputs})
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("family", BASES)
def test_a_zip_becomes_a_lora_that_the_predictor_fuses(
    trainer: Server, bases: Path, tmp_path: Path, family: str
) -> None:
    answer = trained(trainer, input_images=five_pictures(), base_model=BASES[family], **TINY)
    assert answer["status"] == "succeeded", answer["error"]
    assert "5 pictures" in answer["logs"]
    assert "skipped notes.doc" in answer["logs"]
    assert answer["metrics"]["loss"] > 0
    (tmp_path / "trained.tar").write_bytes(base64.b64decode(answer["output"]["weights"].partition(",")[2]))
    with tarfile.open(tmp_path / "trained.tar") as tar:
        assert {name for name in tar.getnames() if not name.startswith("samples")} == FILES
        assert len([name for name in tar.getnames() if name.startswith("samples/step_000008_")]) == 4
        assert json.load(tar.extractfile("config.json"))["trigger"] == "sbu"
        assert len(tar.extractfile("train.jsonl").readlines()) == 1 + TINY["steps"]
    environment = {"KLORA_MODELS": str(bases), "KLORA_LORA_ROOT": str(tmp_path), "KLORA_BASES": BASES[family]}
    with running(tmp_path / "predictor", environment) as predictor:
        bare = predictor.images(**QUICK, model=BASES[family])[0]
        alone = predictor.predict(**QUICK, content_lora="trained.tar")
        named = predictor.images(**QUICK | {"prompt": f"sbu, {QUICK['prompt']}"}, content_lora="trained.tar")[0]
        fused = predictor.predict(**QUICK, content_lora="trained.tar", style_lora="trained.tar", add_triggers=False)
    assert alone["metrics"]["triggers_added"] == "sbu"
    assert np.array_equal(image_of(alone), named)
    assert not np.array_equal(bare, named)
    assert fused["status"] == "succeeded" and "triggers_added" not in fused["metrics"]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_images": zipped(("notes.txt", b"no picture"))}, "no usable picture"),
        ({"input_images": "data:application/zip;base64,AAAA"}, "input_images"),
        ({"input_images": five_pictures(), "resolution": "big"}, "resolution is 'big'"),
        ({"input_images": five_pictures(), "resume_from": zipped(("a", b"b"))}, "resume_from"),
        ({"input_images": five_pictures(), "hf_repo_id": "me/dog"}, "hf_token is not given"),
        ({"input_images": five_pictures(), "mask_mode": "clipseg", "mask_prompt": "dog"}, "segmenter is not installed"),
        ({"input_images": five_pictures(), "layers_to_optimize_regex": "nowhere"}, "names no linear layer"),
    ],
    ids=["no picture", "no archive", "resolution", "no tar", "no token", "no segmenter", "no layer"],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(trainer: Server, inputs: dict[str, Any], said: str) -> None:
    answer = trained(trainer, **TINY | inputs)
    assert answer["status"] == "failed"
    assert said in answer["error"]


def test_an_absurd_number_is_refused_by_the_schema(trainer: Server) -> None:
    status, answer = trainer.call("POST", "/trainings", {"input": {"input_images": five_pictures(), "steps": 0}})
    assert (status, answer["detail"][0]["loc"][-1]) == (422, "steps")


def test_a_file_of_the_container_is_no_upload(trainer: Server) -> None:
    """Cog takes a bare text for a path."""
    status, answer = trainer.call("POST", "/trainings", {"input": {"input_images": "/etc/passwd"} | TINY})
    assert status == 422 or (answer["status"] == "failed" and "passwd" in answer["error"])
    assert "root:" not in str(answer)


def test_a_cancelled_training_goes_on_from_its_tar_as_if_nothing_had_been(trainer: Server) -> None:
    """The tar is in the server's working directory, where a laptop keeps it; the next training is not disturbed."""
    left = ROOT / "trained_model.tar"
    left.unlink(missing_ok=True)
    inputs = {"input_images": five_pictures(), **TINY, "sample_steps": 0}
    request, deadline = {"input": inputs | {"steps": 5000}}, time.monotonic() + 60
    assert trainer.call("PUT", "/trainings/to-cancel", request, {"Prefer": "respond-async"})[0] == 202
    while trainer.call("PUT", "/trainings/to-cancel", request)[1].get("logs", "").count("/5000, ") < 2:
        assert time.monotonic() < deadline, "training never began"
        time.sleep(0.05)
    assert trainer.call("POST", "/trainings/to-cancel/cancel", {})[0] == 200
    while not left.is_file():
        assert time.monotonic() < deadline, "no tar was left"
        time.sleep(0.05)
    with tarfile.open(left) as tar:
        assert {"config.json", "train.jsonl"} <= set(tar.getnames())
        state = tar.extractfile("run.safetensors").read()
    header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
    steps = json.loads(header["__metadata__"]["run"])["step"] + 20
    resume = "data:application/x-tar;base64," + base64.b64encode(left.read_bytes()).decode()
    resumed = trained(trainer, **inputs | {"steps": steps}, resume_from=resume)
    whole = trained(trainer, **inputs | {"steps": steps})
    assert resumed["status"] == whole["status"] == "succeeded", resumed["error"]
    assert resumed["metrics"]["fixed_loss"] == whole["metrics"]["fixed_loss"]
