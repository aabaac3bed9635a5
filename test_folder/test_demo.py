"""The demo's own part of training: what it asks the server for, and where it leaves what comes back."""

import base64
import inspect
import io
import json
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from in_venv import program

import train


@pytest.fixture
def asked() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that says each training has succeeded: its address, and the inputs it was sent."""
    inputs: list[dict[str, Any]] = []

    class Trainer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            inputs.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"])
            weights = base64.b64encode(f"LoRA {len(inputs)}".encode()).decode()
            answer = {"status": "succeeded", "output": {"weights": f"data:application/octet-stream;base64,{weights}"}}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Trainer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", inputs
        server.shutdown()


def test_a_demo_that_trains_asks_for_a_subject_and_a_style_and_keeps_both(
    asked: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, (url, inputs) = program("demo"), asked
    monkeypatch.setattr(demo, "OUT", tmp_path)
    demo.train(url, "flux-dev", tmp_path)
    assert [sent["lora_type"] for sent in inputs] == ["subject", "style"]
    for sent in inputs:
        assert sent.keys() <= inspect.signature(train.train).parameters.keys()
        assert (sent["base_model"], sent["steps"]) == ("flux-dev", demo.TRAIN_STEPS)
        packed = base64.b64decode(sent["input_images"].partition(",")[2])
        assert {Path(name).suffix for name in zipfile.ZipFile(io.BytesIO(packed)).namelist()} == {".png", ".txt"}
    files = [tmp_path / "flux-dev" / f"{name}.safetensors" for name in ("robot", "blueprint")]
    assert [file.read_bytes() for file in files] == [b"LoRA 1", b"LoRA 2"]
