"""The form of predict.py through Cog's real server: LoRAs, families, old payloads, and what is refused of them.

What holds of every model is in conformance/.
"""

import base64
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from klora import cli
from klora.errors import BaseModelError
from klora.studio.provenance import read_provenance
from predict import Predictor
from test_folder.conformance.client import PREDICT
from test_folder.conformance.client import Client as Server
from test_folder.conformance.payloads import data_uri, encoded, gradient

SDXL = {"content_lora": "sdxl_content.safetensors", "style_lora": "sdxl_style.safetensors"}
FLUX = {"content_lora": "flux_content.safetensors", "style_lora": "flux_style.safetensors"}
QUICK = {"prompt": "a photo of a dog", "num_inference_steps": 4, "seed": 7, "output_format": "png"}


def png(image: Image.Image) -> str:
    return data_uri(encoded(image), "image/png")


PICTURE = png(gradient())


@pytest.fixture
def server(predicting: Server) -> Server:
    return predicting


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_a_request_gives_an_image_and_says_what_it_did(server: Server, loras_of: dict[str, str]) -> None:
    answer = server.predict(**QUICK, **loras_of)
    assert answer["status"] == "succeeded", answer["error"]
    assert [uri[:22] for uri in answer["output"]] == ["data:image/png;base64,"]
    metrics = answer["metrics"]
    assert metrics["seed"] == 7
    assert 0 < metrics["style_share"] < 1
    assert metrics["engine"] == "merged"
    assert metrics["flips_per_step"] == round(metrics["flips"] / QUICK["num_inference_steps"], 2) > 0
    assert all(metrics[f"{phase}_seconds"] >= 0 for phase in ("fetch", "fuse", "encode", "denoise", "decode"))


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_each_fusion_gives_another_image_and_the_same_one_again(server: Server, loras_of: dict[str, str]) -> None:
    modes = ("klora", "sum", "content", "style")
    first = {mode: server.images(**QUICK, **loras_of, fusion=mode)[0] for mode in modes}
    assert len({image.tobytes() for image in first.values()}) == len(modes)
    for mode in reversed(modes):
        assert np.array_equal(server.images(**QUICK, **loras_of, fusion=mode)[0], first[mode])


def test_one_lora_alone_acts_everywhere_and_none_leaves_the_base(server: Server) -> None:
    content = server.images(**QUICK, content_lora=SDXL["content_lora"])[0]
    assert np.array_equal(content, server.images(**QUICK, **SDXL, fusion="content")[0])
    assert not np.array_equal(content, server.images(**QUICK, model="sdxl")[0])


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_four_outputs_are_four_seeds(server: Server, loras_of: dict[str, str]) -> None:
    batch = server.images(**QUICK, **loras_of, num_outputs=4)
    single = server.images(**QUICK | {"seed": 9}, **loras_of)[0]
    assert len(batch) == 4
    # A batched matrix product may round differently: one level of 255.
    assert np.abs(batch[2].astype(int) - single).max() <= 1


def test_a_server_gives_sheets_and_the_report_in_one_answer(server: Server) -> None:
    given = {**QUICK, **SDXL, "num_inference_steps": 2, "output_format": "webp"}
    answer = server.predict(**given, report=True, compare=True, sweep=True)
    assert answer["status"] == "succeeded", answer["error"]
    kinds = [uri.partition(";")[0] for uri in answer["output"]]
    assert kinds == ["data:image/webp", "data:image/webp", "data:image/png", "data:application/json"]
    assert answer["metrics"]["fusion"].startswith("klora s* alpha 1.5")
    refused = server.predict(**given, sweep=True, style_bias=2)
    assert refused["error"].endswith("RequestError: style_bias is 2.0 and sweep is asked for. Expected 1.0.")
    assert len(server.predict(**given)["output"]) == 1


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_image_to_image_keeps_more_at_lower_strength(server: Server, loras_of: dict[str, str]) -> None:
    request = QUICK | loras_of | {"image": PICTURE, "num_inference_steps": 10}
    weak, strong = (server.images(**request, prompt_strength=strength)[0] for strength in (0.1, 1))
    kept = server.images(**request, prompt_strength=0.1, model="sdxl" if loras_of is SDXL else "flux-dev")[0]
    assert np.array_equal(weak, kept)
    assert (
        np.abs(weak - np.asarray(gradient(), dtype=int)).mean()
        < np.abs(strong - np.asarray(gradient(), dtype=int)).mean()
    )


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_inpainting_repaints_the_white_part_only(server: Server, loras_of: dict[str, str]) -> None:
    request = QUICK | loras_of | {"image": PICTURE, "prompt_strength": 1}
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    painted = [server.images(**request | {"seed": seed}, mask=png(mask))[0].astype(int) for seed in (1, 2)]
    changed = np.abs(painted[0] - painted[1]).mean(axis=(0, 2))
    assert changed[:24].mean() > 4 * changed[40:].mean()  # away from the border, which the VAE blurs


def test_an_upload_gives_its_shape_to_the_image(server: Server) -> None:
    image = server.images(**QUICK, **SDXL, image=png(gradient((96, 48))))[0]
    assert image.shape[1] == pytest.approx(2 * image.shape[0], rel=0.15)


def test_an_old_flux_dev_lora_request_runs_unchanged(server: Server) -> None:
    answer = server.predict(
        prompt="a photo of a dog", go_fast=True, guidance=3, lora_scale=1, megapixels="1", num_outputs=1, seed=1,
        aspect_ratio="1:1", output_format="webp", output_quality=80, prompt_strength=0.8, num_inference_steps=4,
        lora_weights=FLUX["content_lora"], extra_lora=FLUX["style_lora"], extra_lora_scale=0.9,
    )  # fmt: skip
    assert answer["status"] == "succeeded", answer["error"]
    assert answer["output"][0].startswith("data:image/webp")


def test_an_old_cog_sdxl_request_runs_unchanged(server: Server) -> None:
    answer = server.predict(
        prompt="a photo of a dog", negative_prompt="cat", width=64, height=96, refine="no_refiner", scheduler="PNDM",
        lora_scale=0.6, num_outputs=1, guidance_scale=7.5, apply_watermark=True, high_noise_frac=0.8,
        prompt_strength=0.8, num_inference_steps=4, replicate_weights=SDXL["content_lora"], seed=1,
    )  # fmt: skip
    assert answer["status"] == "succeeded", answer["error"]


@pytest.mark.parametrize("weights", ["lora_weights", "replicate_weights", "hf_lora"])
def test_an_alias_means_its_new_name(server: Server, weights: str) -> None:
    content, style = SDXL.values()
    old = {weights: content, "lora_scale": 0.5, "extra_lora": style, "extra_lora_scale": 1.5, "guidance": 4}
    new = SDXL | {"content_scale": 0.5, "style_scale": 1.5, "guidance_scale": 4}
    assert np.array_equal(server.images(**QUICK, **old)[0], server.images(**QUICK, **new)[0])


def tar_of(answer: dict[str, Any]) -> dict[str, bytes]:
    """The files of the one output, by name."""
    (uri,) = answer["output"]
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_a_file_of_prompts_gives_one_tar_of_images_with_captions(server: Server) -> None:
    answer = server.predict(
        **QUICK | SDXL | {"prompt": "{}, by night", "prompts": data_uri(b"a dog\n\na cat\n", "text/plain")}
    )
    assert answer["status"] == "succeeded", answer["error"]
    files = tar_of(answer)
    assert sorted(files) == [f"0000{i}.{suffix}" for i in (0, 1) for suffix in ("json", "png", "txt")]
    assert files["00001.txt"] == b"a cat, by night"
    alone = server.images(**QUICK | SDXL | {"prompt": "a cat, by night", "seed": 8})[0]
    assert np.abs(np.asarray(Image.open(io.BytesIO(files["00001.png"])), int) - alone).max() <= 1
    assert answer["metrics"]["seed"] == 7
    assert "2 of 2, " in answer["logs"]


def test_of_a_file_of_prompts_what_fails_is_listed_and_the_rest_is_made(server: Server) -> None:
    """Their seeds count from one that the log and the metrics report."""
    lines = b'{"prompt": "a dog", "style_lora": "none.safetensors"}\n{"prompt": "a cat"}\n{"prompt": 1}\n'
    answer = server.predict(prompt="{}", prompts=data_uri(lines, "text/plain"), num_inference_steps=1)
    files, seed = tar_of(answer), answer["metrics"]["seed"]
    assert sorted(files) == ["00001.json", "00001.txt", "00001.webp", "failures.txt"]
    assert json.loads(files["00001.json"])["seed"] == seed + 1
    assert f"seed {seed}\n" in answer["logs"]
    assert [line.partition(" is ")[0] for line in files["failures.txt"].decode().splitlines()] == [
        "line 1: style_lora", "line 3: prompt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "a dog"}, "prompt is 'a dog', with no place for the lines. Expected {} in it, or {} alone."),
        ({"num_outputs": 2}, "num_outputs is 2, but each line is one image. Leave it out."),
        ({"prompts": data_uri(b"a\n" * 1001, "text/plain")}, "prompts has 1001 lines. Expected at most 1000."),
        ({"model": "flux-dev", "negative_prompt": "x"}, "No image was made. line 1: negative_prompt is given, but"),
        ({"prompts": "/etc/passwd"}, ""),
    ],
)
def test_a_file_of_prompts_that_cannot_be_worked_through_is_refused(
    server: Server, given: dict[str, Any], said: str
) -> None:
    answer = server.predict(**QUICK | {"prompt": "{}", "prompts": data_uri(b"a dog", "text/plain")} | given)
    assert answer["status"] == "failed"
    assert said in answer["error"] and "root:" not in answer["error"]


def test_an_image_is_made_again_by_the_command_from_what_it_tells(
    server: Server, bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = QUICK | SDXL | {"num_outputs": 2, "output_format": "webp", "disable_safety_checker": True}
    del asked["seed"]
    answer = server.predict(**asked, hf_api_token="hf_CANARYtoken")
    body = base64.b64decode(answer["output"][1].partition(",")[2])
    assert b"CANARY" not in body and str(loras).encode() not in body
    (tmp_path / "it.webp").write_bytes(body)
    assert read_provenance(tmp_path / "it.webp").seed == answer["metrics"]["seed"] + 1
    for file in SDXL.values():
        shutil.copy(loras / file, tmp_path)
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["reproduce", "it.webp"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("\nthe same pixels as it.webp\n")


REFUSED = {
    "other family": ({"content_lora": FLUX["content_lora"], "model": "sdxl"}, ["content_lora", "FLUX.1", "SDXL"]),
    "two families": (
        {"content_lora": SDXL["content_lora"], "style_lora": FLUX["style_lora"]},
        ["style_lora", "FLUX.1", "SDXL"],
    ),
    "missing file": ({"style_lora": "none.safetensors"}, ["style_lora", "none.safetensors"]),
    "negative prompt on FLUX": ({"model": "flux-dev", "negative_prompt": "cat"}, ["negative_prompt", "FLUX.1"]),
    "guidance on schnell": ({"model": "flux-schnell", "guidance_scale": 3.5}, ["guidance_scale is 3.5", "FLUX.1"]),
    "scheduler on FLUX": ({"model": "flux-dev", "scheduler": "DDIM"}, ["scheduler", "FLUX.1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_fails_with_one_sentence_and_the_next_is_unaffected(server: Server, case: str) -> None:
    inputs, parts = REFUSED[case]
    before = server.images(**QUICK, **SDXL)[0]
    said = server.error(**QUICK | inputs)
    assert all(part in said for part in parts), said
    assert "Traceback" not in said
    assert np.array_equal(server.images(**QUICK, **SDXL)[0], before)


def test_a_cancelled_fusion_leaves_the_next_one_right(server: Server) -> None:
    """The LoRAs are off the base again, wherever the cancellation struck."""
    before = server.images(**QUICK, **SDXL)[0]
    slow = QUICK | SDXL | {"num_inference_steps": 500, "num_outputs": 4}
    client = Server(server.url, PREDICT._replace(slow=slow))
    client.begin("fusion")
    assert client.cancel("fusion") == 200
    assert np.array_equal(server.images(**QUICK, **SDXL)[0], before)


@pytest.mark.parametrize(("folder", "seen"), [("", "has no base model"), ("nowhere", "is no folder")])
def test_set_up_without_bases_fails_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, seen: str
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path / folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # set-up makes a folder there
    with pytest.raises(BaseModelError, match=f"^A base model is not installed: {tmp_path / folder} {seen}. Expected "):
        Predictor().setup()
