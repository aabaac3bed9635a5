"""The predictor through Cog's real server: good requests, old payloads, refusals, cancellation. Loopback only."""

import base64
import io
import json
import re
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klora.errors import BaseModelError
from predict import Predictor

ROOT = Path(__file__).resolve().parent.parent
PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")  # as Replicate's clients parse it

SDXL = {"content_lora": "sdxl_content.safetensors", "style_lora": "sdxl_style.safetensors"}
FLUX = {"content_lora": "flux_content.safetensors", "style_lora": "flux_style.safetensors"}
QUICK = {"prompt": "a photo of a dog", "num_inference_steps": 4, "seed": 7, "output_format": "png"}


class Server:
    """A client of one running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(status, JSON body); waits while Cog's one slot is still being freed."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, method=method)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            request.add_header(name, value)
        for _ in range(600):
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return response.status, json.load(response)
            except urllib.error.HTTPError as error:
                if error.code != 409:
                    return error.code, json.load(error)
                time.sleep(0.05)
        raise TimeoutError("The server stayed busy.")

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """The answer to one prediction, whatever its status."""
        status, answer = self.call("POST", "/predictions", {"input": inputs})
        assert status == 200, answer
        return answer

    def images(self, **inputs: Any) -> list[np.ndarray]:
        """The pixels of a prediction that succeeds."""
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer["error"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))) for uri in answer["output"]]

    def error(self, **inputs: Any) -> str:
        """The one sentence of a prediction that fails."""
        answer = self.predict(**inputs)
        assert answer["status"] == "failed", answer
        return answer["error"]


@contextmanager
def running(folder: Path, environment: dict[str, str], *, train: bool = False) -> Iterator[Server]:
    """A server of its own, its log in the folder."""
    loader = SourceFileLoader("serve", str(ROOT / "script" / "serve"))
    serve = module_from_spec(spec_from_loader("serve", loader))
    loader.exec_module(serve)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    environment = environment | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log, serve.serving(port, log, environment, train=train, seconds=180) as url:
        yield Server(url)


@pytest.fixture(scope="module")
def server(bases: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {"KLORA_MODELS": str(bases), "KLORA_LORA_ROOT": str(loras)}
    with running(tmp_path_factory.mktemp("server"), environment) as server:
        yield server


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gradient(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_a_request_gives_an_image_and_says_what_it_did(server: Server, loras_of: dict[str, str]) -> None:
    answer = server.predict(**QUICK, **loras_of)
    assert answer["status"] == "succeeded", answer["error"]
    assert [uri[:22] for uri in answer["output"]] == ["data:image/png;base64,"]
    metrics = answer["metrics"]
    assert metrics["seed"] == 7
    assert 0 < metrics["style_share"] < 1
    assert all(metrics[f"{phase}_seconds"] >= 0 for phase in ("fetch", "fuse", "encode", "denoise", "decode"))


def test_progress_lines_are_those_that_clients_parse(server: Server) -> None:
    lines = [PROGRESS.match(line) for line in server.predict(**QUICK, **SDXL)["logs"].splitlines()]
    seen = [tuple(int(part) for part in match.groups()) for match in lines if match]
    assert seen == [(0, 0, 4), (25, 1, 4), (50, 2, 4), (75, 3, 4), (100, 4, 4)]


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


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_image_to_image_keeps_more_at_lower_strength(server: Server, loras_of: dict[str, str]) -> None:
    request = QUICK | loras_of | {"image": data_uri(gradient()), "num_inference_steps": 10}
    weak, strong = (server.images(**request, prompt_strength=strength)[0] for strength in (0.1, 1))
    kept = server.images(**request, prompt_strength=0.1, model="sdxl" if loras_of is SDXL else "flux-dev")[0]
    assert np.array_equal(weak, kept)
    assert (
        np.abs(weak - np.asarray(gradient(), dtype=int)).mean()
        < np.abs(strong - np.asarray(gradient(), dtype=int)).mean()
    )


@pytest.mark.parametrize("loras_of", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_inpainting_repaints_the_white_part_only(server: Server, loras_of: dict[str, str]) -> None:
    request = QUICK | loras_of | {"image": data_uri(gradient()), "prompt_strength": 1}
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    painted = [server.images(**request | {"seed": seed}, mask=data_uri(mask))[0].astype(int) for seed in (1, 2)]
    changed = np.abs(painted[0] - painted[1]).mean(axis=(0, 2))
    assert changed[:24].mean() > 4 * changed[40:].mean()  # away from the border, which the VAE blurs


def test_an_upload_gives_its_shape_to_the_image(server: Server) -> None:
    image = server.images(**QUICK, **SDXL, image=data_uri(gradient((96, 48))))[0]
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


def test_an_alias_means_its_new_name(server: Server) -> None:
    old = {"lora_weights": SDXL["content_lora"], "lora_scale": 0.5, "guidance": 4}
    new = {"content_lora": SDXL["content_lora"], "content_scale": 0.5, "guidance_scale": 4}
    assert np.array_equal(server.images(**QUICK, **old)[0], server.images(**QUICK, **new)[0])


def test_seed_zero_is_a_seed_and_an_absent_one_is_reported(server: Server) -> None:
    zero = server.predict(**QUICK | {"seed": 0})
    assert zero["metrics"]["seed"] == 0
    chosen = server.predict(**{name: value for name, value in QUICK.items() if name != "seed"})
    seed = chosen["metrics"]["seed"]
    assert f"seed {seed}" in chosen["logs"]
    assert server.predict(**QUICK | {"seed": seed})["output"] == chosen["output"]


def test_a_whole_number_may_be_written_as_json_writes_a_float(server: Server) -> None:
    floats = {"num_inference_steps": 4.0, "seed": 7.0, "num_outputs": 1.0, "width": 64.0, "height": 64.0}
    assert np.array_equal(server.images(**QUICK | floats)[0], server.images(**QUICK)[0])


REFUSED_BY_SCHEMA = [
    ({"fusion": "blend"}, "fusion", "is not one of"),
    ({"num_outputs": 5}, "num_outputs", "maximum"),
    ({"style_bias": -1}, "style_bias", "minimum"),
    ({"num_inference_steps": "many"}, "num_inference_steps", "integer"),
]


@pytest.mark.parametrize(("inputs", "name", "said"), REFUSED_BY_SCHEMA, ids=[case[1] for case in REFUSED_BY_SCHEMA])
def test_a_bad_value_is_refused_by_the_schema(server: Server, inputs: dict[str, Any], name: str, said: str) -> None:
    status, answer = server.call("POST", "/predictions", {"input": QUICK | inputs})
    assert status == 422
    assert name in answer["detail"][0]["loc"]
    assert said in answer["detail"][0]["msg"]


def test_a_missing_prompt_is_refused_by_the_schema(server: Server) -> None:
    status, answer = server.call("POST", "/predictions", {"input": {"seed": 1}})
    assert (status, answer["detail"][0]["loc"][-1]) == (422, "prompt")


REFUSED = {
    "alias and name": (
        {"content_lora": "a.safetensors", "lora_weights": "b.safetensors"},
        ["lora_weights", "content_lora", "a.safetensors", "b.safetensors"],
    ),
    "other family": ({"content_lora": FLUX["content_lora"], "model": "sdxl"}, ["content_lora", "FLUX.1", "SDXL"]),
    "two families": (
        {"content_lora": SDXL["content_lora"], "style_lora": FLUX["style_lora"]},
        ["style_lora", "FLUX.1", "SDXL"],
    ),
    "missing file": ({"style_lora": "none.safetensors"}, ["style_lora", "none.safetensors"]),
    "path outside": ({"content_lora": "../../etc/passwd"}, ["content_lora", "'..'"]),
    "file of the server": ({"image": "/etc/hostname"}, ["image", "/etc/hostname", "upload"]),
    "no image": ({"image": "data:image/png;base64,AAAA"}, ["image", "PNG"]),
    "mask alone": ({"mask": data_uri(gradient())}, ["mask", "image"]),
    "size": ({"width": 100, "height": 64}, ["100x64", "multiples of 8"]),
    "negative prompt on FLUX": ({"model": "flux-dev", "negative_prompt": "cat"}, ["negative_prompt", "FLUX.1"]),
    "scheduler on FLUX": ({"model": "flux-dev", "scheduler": "DDIM"}, ["scheduler", "FLUX.1"]),
    "no style": ({"fusion": "style"}, ["fusion", "style_lora"]),
    "ratio and size": ({"aspect_ratio": "1:1", "width": 64}, ["aspect_ratio", "custom"]),
    "empty prompt": ({"prompt": " "}, ["prompt"]),
    "no step": ({"image": data_uri(gradient()), "prompt_strength": 0.1}, ["prompt_strength", "0.1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_fails_with_one_sentence_and_the_next_is_unaffected(server: Server, case: str) -> None:
    inputs, parts = REFUSED[case]
    before = server.images(**QUICK, **SDXL)[0]
    said = server.error(**QUICK | inputs)
    assert all(part in said for part in parts), said
    assert "Traceback" not in said
    assert np.array_equal(server.images(**QUICK, **SDXL)[0], before)


def test_a_cancelled_request_leaves_the_next_one_right(server: Server) -> None:
    before = server.images(**QUICK, **SDXL)[0]
    answers: list[Any] = []
    request = {"input": QUICK | SDXL | {"num_inference_steps": 500, "num_outputs": 4}}
    client = threading.Thread(target=lambda: answers.append(server.call("PUT", "/predictions/long", request)))
    client.start()
    deadline = time.monotonic() + 60
    while server.call("GET", "/health-check")[1]["status"] != "BUSY":  # or the next call would itself be the first
        assert time.monotonic() < deadline, "the prediction never began"
        time.sleep(0.01)
    while server.call("PUT", "/predictions/long", request)[1].get("logs", "").count("|") < 20:
        assert time.monotonic() < deadline, "denoising never began"
        time.sleep(0.05)
    assert server.call("POST", "/predictions/long/cancel")[0] == 200
    client.join(60)
    assert answers[0][1]["status"] == "canceled"
    assert np.array_equal(server.images(**QUICK, **SDXL)[0], before)


@pytest.mark.parametrize(("folder", "seen"), [("", "has no base model"), ("nowhere", "is no folder")])
def test_set_up_without_bases_fails_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, seen: str
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path / folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # set-up makes a folder there
    with pytest.raises(BaseModelError, match=f"^A base model is not installed: {tmp_path / folder} {seen}. Expected "):
        Predictor().setup()


def test_tokens_are_not_echoed_by_us(server: Server) -> None:
    answer = server.predict(**QUICK, hf_api_token="hf_sesame", civitai_api_token="cv_sesame")
    assert answer["status"] == "succeeded", answer["error"]
    assert "sesame" not in json.dumps(answer)
