"""A zip through Cog's real training server, and the LoRA that comes out through the predictor. Loopback only."""

import base64
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from test_folder.test_predict import QUICK, Server, running

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
        alone = predictor.images(**QUICK, content_lora="trained.tar")[0]
        fused = predictor.predict(**QUICK, content_lora="trained.tar", style_lora="trained.tar")
    assert not np.array_equal(bare, alone)
    assert fused["status"] == "succeeded"


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_images": zipped(("notes.txt", b"no picture"))}, "no usable picture"),
        ({"input_images": "data:application/zip;base64,AAAA"}, "input_images"),
        ({"input_images": five_pictures(), "resolution": "big"}, "resolution is 'big'"),
        ({"input_images": five_pictures(), "layers_to_optimize_regex": "nowhere"}, "names no linear layer"),
    ],
    ids=["no picture", "no archive", "resolution", "no layer"],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(trainer: Server, inputs: dict[str, Any], said: str) -> None:
    answer = trained(trainer, **TINY | inputs)
    assert answer["status"] == "failed"
    assert said in answer["error"]


def test_an_absurd_number_is_refused_by_the_schema(trainer: Server) -> None:
    status, answer = trainer.call("POST", "/trainings", {"input": {"input_images": five_pictures(), "steps": 0}})
    assert (status, answer["detail"][0]["loc"][-1]) == (422, "steps")
