"""What deploys the image: the push script, the manifest and its probes, the inputs that a push tries."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_venv import program

import predict
from klora.form.request import Request

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = list(yaml.safe_load_all((ROOT / "docs" / "kubernetes.yaml").read_text()))
[CONTAINER] = MANIFEST[0]["spec"]["template"]["spec"]["containers"]


# The manifest.


def test_the_parts_of_the_manifest_belong_together() -> None:
    deployment, service, scaler, budget = MANIFEST
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert labels == budget["spec"]["selector"]["matchLabels"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [port] = CONTAINER["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == 5000  # Cog's
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == "1"
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes


def test_the_manifests_settings_are_ours() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{setting['name']}`" in readme for setting in CONTAINER["env"])


@pytest.mark.parametrize(
    ("status", "passing"),
    [
        ("READY", {"startupProbe", "readinessProbe", "livenessProbe"}),
        ("BUSY", {"startupProbe", "livenessProbe"}),
        ("STARTING", set()),
        ("SETUP_FAILED", set()),
        ("UNHEALTHY", set()),
        ("DEFUNCT", set()),
    ],
)
def test_the_probes_read_the_status(status: str, passing: set[str]) -> None:
    with answering(status) as port:
        assert {probe for probe in CONTAINER if probe.endswith("Probe") and probed(probe, port)} == passing


def test_the_probes_fail_where_nothing_answers() -> None:
    with answering("READY") as port:
        pass
    assert not any(probed(probe, port) for probe in ("startupProbe", "readinessProbe", "livenessProbe"))


def probed(probe: str, port: int) -> bool:
    """Whether a probe's command succeeds on a server at this port."""
    command = [part.replace(":5000/", f":{port}/") for part in CONTAINER[probe]["exec"]["command"]]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@contextmanager
def answering(status: str) -> Iterator[int]:
    """The port of a server whose health is this."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health-check"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": status}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


# script/push.


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The script beside a cog.yaml, and programs in the place of cog and of the checks that write down their calls."""
    for name in ("script/lint", "bin/cog"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/sh\necho "{file.name}" "$@" >>"{tmp_path}/calls"\n')
        file.chmod(0o755)
    (tmp_path / "script" / "push").write_text((ROOT / "script" / "push").read_text())
    (tmp_path / "cog.yaml").write_text((ROOT / "cog.yaml").read_text())
    return tmp_path


def push(project: Path, *options: str, **environment: str) -> tuple[int, str, list[str]]:
    """(exit status, what it said, what it called) of script/push."""
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    given = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | {"PATH": path} | environment
    command = ["sh", project / "script" / "push", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)
    calls = project / "calls"
    return done.returncode, done.stderr, calls.read_text().splitlines() if calls.exists() else []


SECRET = "--secret id=hf_token,env=HF_TOKEN"


def test_a_push_checks_first_and_gives_the_token_as_a_secret(project: Path) -> None:
    (project / "cog.yaml").write_text("  mounts:\n    - {type: secret, id: hf_token}\n")
    code, said, calls = push(project, "ada/klora", HF_TOKEN="hf_abc")
    assert (code, said, calls) == (0, "", ["lint", f"cog push r8.im/ada/klora {SECRET}"])
    assert push(project, "--only-build", "ada/klora", HF_TOKEN="hf_abc")[2][2:] == [
        "lint",
        f"cog build --tag r8.im/ada/klora {SECRET}",
    ]


def test_a_push_without_a_gated_base_needs_no_token(project: Path) -> None:
    (project / "cog.yaml").write_text("# - {type: secret, id: hf_token}\n")
    assert push(project, "ada/klora") == (0, "", ["lint", "cog push r8.im/ada/klora"])


def test_a_push_without_the_token_is_refused_before_anything_is_done(project: Path) -> None:
    (project / "cog.yaml").write_text("  mounts:\n    - {type: secret, id: hf_token}\n")
    code, said, calls = push(project, "ada/klora")
    assert (code, calls) == (2, [])
    assert said.startswith("HF_TOKEN is not set") and "Expected" in said


@pytest.mark.parametrize("model", ["", "klora", "/klora", "ada/", "r8.im/ada/klora", "ada/klo ra", "ada/klora;id"])
def test_a_model_without_owner_and_name_is_refused(project: Path, model: str) -> None:
    code, said, calls = push(project, model)
    assert (code, calls) == (2, [])
    assert f'The model is "{model}". Expected owner/name' in said


# cog-safe-push.


def test_what_a_push_tries_are_inputs_of_the_form() -> None:
    config = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())
    schemas = program("schema").schema_of(ROOT)["components"]["schemas"]
    known = schemas["Input"]["properties"]
    for case in config["predict"]["test_cases"]:
        assert case.keys() - {"inputs"} <= {"match_prompt", "error_contains"}
        assert len(case) == 2
        for name, value in case["inputs"].items():
            choices = schemas.get(name, {}).get("enum")
            assert name in known and (choices is None or value in choices)
    fuzz = config["predict"]["fuzz"]
    assert {*fuzz["fixed_inputs"], *fuzz["disabled_inputs"]} <= known.keys()


def test_the_form_takes_what_a_push_makes_up() -> None:
    """Of every two inputs the bounds, each choice and a text; what is refused would fail the push."""
    fuzz = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())["predict"]["fuzz"]
    schemas = program("schema").schema_of(ROOT)["components"]["schemas"]
    own = {*fuzz["fixed_inputs"], *fuzz["disabled_inputs"]}
    varied = {name: said for name, said in schemas["Input"]["properties"].items() if name not in own}
    given = [(name, value) for name, said in varied.items() for value in made_up(said, schemas.get(name, {}))]
    assert len(given) > 20
    for pair in combinations(given, 2):
        inputs = predict._inputs({"prompt": "x", **fuzz["fixed_inputs"], **dict(pair)})
        request = Request(**inputs)
        request.check_roles([])
        assert not request.loras, "there is no such LoRA"


def made_up(said: dict[str, Any], choices: dict[str, Any]) -> list[Any]:
    bounds = [said[bound] for bound in ("minimum", "maximum") if bound in said]
    return choices.get("enum") or bounds or ([True, False] if said["type"] == "boolean" else ["text"])
