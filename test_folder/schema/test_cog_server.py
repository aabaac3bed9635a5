"""Cog's inspector and its real server on what script/schema writes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cog import _inspector

from test_folder.schema.project import PROGRAM, load

SAMPLE = """from __future__ import annotations
import json
from typing import Optional
from cog import BasePredictor, Input, Path, Secret

SIZES = {"small": (512, 512), "large": (1024, 1024)}
STYLES = ["ink", "oil"]
STEPS = 28


class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(description="What to draw."),
        style: str = Input(description="A style.", choices=STYLES + ["none"], default="none"),
        size: str = Input(description="A size.", choices=list(SIZES.keys()), default="small"),
        rank: int = Input(description="A rank.", choices=[4, 8], default=4),
        steps: int = Input(description="Steps.", default=STEPS, ge=1, le=1_000),
        scale: float = Input(description="A scale.", default=-1e-4, ge=-2.5, le=2.0),
        seed: Optional[int] = Input(description="A seed.", le=2147483647),
        word: str = Input(description="A word.", default="ab", min_length=1, max_length=5, regex=r"^\\w+$"),
        tags: list[str] = Input(description="Tags.", default=[]),
        flag: bool = Input(description="A flag.", default=False, deprecated=True),
        token: Secret = Input(description="A token.", default=None),
        key: Optional[Secret] = Input(description="A key.", default=None),
        image: Path | None = Input(description="An image.", accept="image/*"),
        pages: Optional[list[Path]] = Input(description="Pages."),
    ) -> str:
        given = {name: value for name, value in locals().items() if name != "self"}
        return json.dumps({name: [type(value).__name__, read(value)] for name, value in given.items()})


def read(value: object) -> object:
    if isinstance(value, Path):
        return value.read_text()
    if isinstance(value, list):
        return [read(item) for item in value]
    return value.get_secret_value() if isinstance(value, Secret) else value
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample")
    (root / "cog.yaml").write_text("predict: predict.py:Predictor  # here\n")
    (root / "predict.py").write_text(SAMPLE)
    subprocess.run([sys.executable, str(PROGRAM), "--root", str(root)], check=True, capture_output=True)
    return root


@pytest.mark.filterwarnings("ignore:.* deprecated; use:DeprecationWarning")
def test_schema_says_what_python_says(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sample_predict", load("sample_predict", sample / "predict.py"))
    inputs = _inspector.create_predictor("sample_predict", "Predictor").inputs
    schemas = json.loads((sample / ".cog" / "openapi_schema.json").read_text())["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    for name, field in inputs.items():
        written = properties[name]
        assert written["x-order"] == field.order
        assert written["description"] == field.description
        assert written.get("default") == field.default
        assert (written.get("minimum"), written.get("maximum")) == (field.ge, field.le)
        assert (written.get("minLength"), written.get("maxLength")) == (field.min_length, field.max_length)
        assert written.get("pattern") == field.regex
        assert written.get("deprecated") == field.deprecated
        assert schemas.get(name, {}).get("enum") == field.choices
    assert properties.keys() == inputs.keys()
    assert schemas["Input"]["required"] == ["prompt"]


class Server:
    """Cog's real server on a project, at a loopback port."""

    def __init__(self, root: Path, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the worker is started as `python`
        stub = {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "PORT": str(port), "PATH": path}
        command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            command, cwd=root, env=os.environ | stub, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def predict(self, **inputs: Any) -> tuple[int, dict[str, Any]]:
        """Answer to a prediction, asked for when the server is ready: right after another it answers 409."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self.call("/health-check")[1]["status"] == "READY":
                    status, answer = self.call("/predictions", {"input": inputs})
                    if status != 409:
                        return status, answer
            except urllib.error.URLError:
                assert self.process.poll() is None, "the server ended"
            time.sleep(0.02)
        raise TimeoutError("the server was not ready within 60 seconds")


@pytest.fixture(scope="module")
def server(sample: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(sample, port)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(5)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.mark.parametrize(
    ("inputs", "field", "message"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": "x", "style": "zzz"}, "style", '"zzz" is not one of ["ink","oil","none"]'),
        ({"prompt": "x", "rank": 5}, "rank", "5 is not one of [4,8]"),
        ({"prompt": "x", "steps": 0}, "steps", "0 is less than the minimum of 1"),
        ({"prompt": "x", "steps": 1001}, "steps", "1001 is greater than the maximum of 1000"),
        ({"prompt": "x", "steps": "2"}, "steps", '"2" is not of type "integer"'),
        ({"prompt": "x", "scale": 3}, "scale", "3 is greater than the maximum of 2"),
        ({"prompt": "x", "scale": -2.6}, "scale", "-2.6 is less than the minimum of -2.5"),
        ({"prompt": "x", "word": "toolong"}, "word", '"toolong" is longer than 5 characters'),
        ({"prompt": "x", "word": "a b"}, "word", '"a b" does not match "^\\w+$"'),
        ({"prompt": "x", "tags": [1]}, "tags/0", '1 is not of type "string"'),
        ({"prompt": "x", "seed": None}, "seed", 'null is not of type "integer"'),
    ],
)
def test_server_refuses_what_the_schema_forbids(
    server: Server, inputs: dict[str, Any], field: str, message: str
) -> None:
    status, answer = server.predict(**inputs)
    assert status == 422
    assert [(error["loc"], error["msg"]) for error in answer["detail"]] == [(["body", "input", field], message)]


def test_server_fills_in_defaults_and_lets_optional_inputs_out(server: Server) -> None:
    status, answer = server.predict(prompt="x")
    assert status == 200
    assert json.loads(answer["output"]) == {
        "prompt": ["str", "x"],
        "style": ["str", "none"],
        "size": ["str", "small"],
        "rank": ["int", 4],
        "steps": ["int", 28],
        "scale": ["float", -0.0001],
        "seed": ["NoneType", None],
        "word": ["str", "ab"],
        "tags": ["list", []],
        "flag": ["bool", False],
        "token": ["NoneType", None],
        "key": ["NoneType", None],
        "image": ["NoneType", None],
        "pages": ["NoneType", None],
    }


def test_server_turns_text_into_secrets_and_paths(server: Server) -> None:
    page = "data:text/plain;base64,aGVsbG8="
    status, answer = server.predict(prompt="x", token="t", key="k", image=page, pages=[page, page])
    assert status == 200
    output = json.loads(answer["output"])
    assert output["token"] == ["Secret", "t"]
    assert output["key"] == ["Secret", "k"]
    assert output["image"] == ["Path", "hello"]
    assert output["pages"] == ["list", ["hello", "hello"]]
