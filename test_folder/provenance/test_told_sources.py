"""A record tells where LoRAs and bases came from, by sha256 and commit, and no secret."""

import base64
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file as load
from safetensors.torch import save_file as save

import weights
from klora.bases.install import ensure_base
from klora.bases.table import BASES
from klora.files.shelf import Shelf
from klora.form.request import Request
from klora.studio import Studio, save_images
from klora.studio.provenance import UsedLoRA, read_provenance, sources_of
from test_folder.fakes import Storage
from test_folder.fakes.base_hub import serving
from test_folder.fakes.hub import Hub
from test_folder.provenance.records import FORMATS, SHA256, digest, made


@pytest.fixture
def hub(settings: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(storage) as hub:
        hub.tokens_issued = {"hf_CANARYtoken"}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("KLORA_TRUSTED_HOSTS", storage.host)
        yield hub


def drawn(
    studio: Studio, files: weights.LoRAFiles, folder: Path, tokens: Mapping[str, str] | None = None, **given: Any
) -> list[Path]:
    """As predict.py and the command do it."""
    asked = Request("a dog", num_inference_steps=2, seed=7, disable_safety_checker=True, **given)
    with files.borrowed(asked.loras, tokens or {}) as paths:
        images = studio.make(asked, paths)
    return save_images(images, folder, asked)


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_secret_of_a_request_is_in_its_images(
    studio: Studio, hub: Hub, storage: Storage, loras: Path, settings: Path, output_format: str
) -> None:
    content, style = ((loras / f"sdxl_{role}.safetensors").read_bytes() for role in ("content", "style"))
    hub.publish("o/m", {"x.safetensors": content}, readers={"hf_CANARYtoken"})
    encoded = base64.b64encode(style).decode()
    signed = storage.signed("/oil.safetensors", style)
    shutil.copy(loras / "sdxl_style.safetensors", settings / "oil.safetensors")
    secrets = ["hf_CANARYtoken", signed.partition("=")[2], encoded[:60], str(settings), str(settings.parent), "X-Amz"]
    tokens = {"hf": "hf_CANARYtoken", "civitai": "CANARYcivitai", "replicate": "CANARYreplicate"}
    shown = {
        signed: signed.partition("?")[0],
        f"data:application/octet-stream;base64,{encoded}": f"data:{digest(style)}",
        str(settings / "oil.safetensors"): "oil.safetensors",
        f"../{settings.name}/oil.safetensors": "oil.safetensors",
        f"./oil.safetensors#sha256={digest(style)}": "oil.safetensors",
    }
    for number, (reference, canonical) in enumerate(shown.items()):
        given = {"content_lora": "hf:o/m", "style_lora": reference, "output_format": output_format}
        files = weights.LoRAFiles(anywhere=True)
        (file,) = drawn(studio, files, settings / str(number), tokens, **given)
        told = read_provenance(file)
        assert told.loras["content_lora"] == UsedLoRA("hf:o/m", (digest(content),))
        assert told.loras["style_lora"] == UsedLoRA(canonical, (digest(style),))
        body = file.read_bytes()
        for secret in (*secrets, *tokens.values(), "CANARY"):
            assert secret.encode() not in body and secret.encode("utf-16-be") not in body


def test_a_server_tells_the_path_below_its_folder(studio: Studio, loras: Path, settings: Path) -> None:
    (settings / "root" / "deep").mkdir(parents=True)
    shutil.copy(loras / "sdxl_style.safetensors", settings / "root" / "deep" / "oil.safetensors")
    files = weights.LoRAFiles(settings / "root")
    (file,) = drawn(studio, files, settings / "out", style_lora="./deep//oil.safetensors")
    assert read_provenance(file).loras["style_lora"].reference == "deep/oil.safetensors"


def test_of_a_peft_repository_every_file_counts_wherever_it_is(
    studio: Studio, hub: Hub, settings: Path, loras: Path
) -> None:
    layers = {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in load(loras / "sdxl_style.safetensors").items()
    }
    (settings / "peft").mkdir()
    save(layers, settings / "peft" / "adapter_model.safetensors")
    (settings / "peft" / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 4, "peft_type": "LORA"}')
    hub.publish("o/m", {path.name: path.read_bytes() for path in (settings / "peft").iterdir()})
    used = []
    for reference in ("hf:o/m", "peft", "peft/adapter_model.safetensors"):
        (file,) = drawn(studio, weights.LoRAFiles(anywhere=True), settings / "out", style_lora=reference)
        used.append(read_provenance(file).loras["style_lora"].sha256)
    names = "adapter_model.safetensors", "adapter_config.json"
    assert used == [tuple(digest((settings / "peft" / name).read_bytes()) for name in names)] * 3


def test_a_local_file_is_read_for_its_sha256_once_and_again_when_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, file = Shelf(), tmp_path / "dog.safetensors"
    file.write_bytes(b"one")
    status = file.stat()
    assert shelf.sha256(file) == (digest(b"one"),)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert shelf.sha256(file) == (digest(b"one"),)
    file.write_bytes(b"two")
    while file.stat().st_ctime_ns == status.st_ctime_ns:  # the clock of files ticks every few milliseconds
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` and rsync leave it
    assert shelf.sha256(file) == (digest(b"two"),)


def test_a_fetched_file_is_not_read_for_its_sha256(tmp_path: Path) -> None:
    """The cache has named its scores by it."""
    place = tmp_path / f"{SHA256}-{'b' * 64}.json"
    assert Shelf().sha256(tmp_path / "is not there", place) == (SHA256, "b" * 64)


@pytest.mark.parametrize("base", ["flux-schnell", "illustrious-xl"])
def test_a_base_that_klora_has_fetched_is_told_with_its_commits(tmp_path: Path, base: str) -> None:
    entry = BASES[base]
    with serving() as server:
        server.hub.publish(*entry.sources)
        server.hub.others[entry.repository] = server.hub.files | {"Illustrious-XL-v1.0.safetensors": b"weights"}
        folder = ensure_base(base, entry, tmp_path, endpoint=server.address)
    expected = {source.repository: source.revision for source in entry.sources}
    assert made(folder, model=base).sources == sources_of(base, folder) == expected
    assert sources_of(base, tmp_path) == {}
