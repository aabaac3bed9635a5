"""Where nothing is installed, the toy bases are taken, and it is said once."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weights
from test_folder.naming.places import folder_of_bases

ROOT = Path(__file__).resolve().parents[2]
TOLD = (
    "No base models in ~/.cache/klora/models: using the toy ones in examples/toy (pictures of shapes). "
    "Set KLORA_MODELS for real ones."
)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of toy bases, and a home without any."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder_of_bases(tmp_path / "toy", "sdxl", "flux-dev")


def test_without_bases_the_toys_and_their_loras_are_taken_and_it_is_said_once(
    toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        weights.use_toys_if_no_bases(toys)
    assert weights.find_base(None, "flux") == ("flux-dev", "flux", toys / "flux-dev")
    assert weights.lora_root() == toys / "loras"
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, TOLD)]


def test_a_lora_folder_of_ones_own_stays_with_the_toys(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_LORA_ROOT", "/mine")
    weights.use_toys_if_no_bases(toys)
    assert (weights.models_folder(), weights.lora_root()) == (toys, Path("/mine"))


@pytest.mark.parametrize("case", ["KLORA_MODELS is set", "a base is installed", "no toys are there"])
def test_otherwise_nothing_is_chosen_nor_said(
    toys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    if case == "KLORA_MODELS is set":
        monkeypatch.setenv("KLORA_MODELS", "/nowhere")
    elif case == "a base is installed":
        folder_of_bases(weights.models_folder(), "flux-schnell")
    else:
        shutil.rmtree(toys)
    before = dict(os.environ)
    weights.use_toys_if_no_bases(toys)
    assert (dict(os.environ), caplog.records) == (before, [])


def test_the_toys_are_beside_the_programs() -> None:
    assert ROOT / "examples" / "toy" == weights.TOYS


# What script/serve needs of the repository, and in cog's place a server that says what it is given and ends.
SERVED = ("predict.py", "train.py", "cog.yaml", "weights.py", "script/serve", "script/schema", "script/in_venv.py")
ECHO = """import os, shutil, sys
print(sys.argv[1:], shutil.which("python"), os.environ["KLORA_MODELS"], os.environ["KLORA_LORA_ROOT"])
"""
WAITING = "import os, signal, sys\nprint('pid', os.getpid(), file=sys.stderr, flush=True)\nsignal.pause()"
BUSY = """import os, signal, sys
def finish(*_):
    print('finishing', file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, finish)
print('pid', os.getpid(), file=sys.stderr, flush=True)
while True:
    signal.pause()"""

READY_ONCE = """
import http.server, os
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "READY"}')
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Ready).handle_request()
os._exit(3)
"""


@pytest.fixture
def served(toys: Path, tmp_path: Path) -> Path:
    """A repository with what script/serve needs, and such a server."""
    for name in SERVED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "script" / "setup").symlink_to(shutil.which("true"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "cog" / "server").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("server/__init__.py", ""), ("server/http.py", ECHO)):
        (tmp_path / "cog" / name).write_text(text)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "toy").symlink_to(toys)
    return tmp_path


def serve(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repository / "script" / "serve", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """It has a port of loopback, and listens there only when it is told to."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        yield listener


@pytest.mark.parametrize("mode", ["predict", "train"])
def test_script_serve_hands_the_toys_to_its_server(served: Path, listener: socket.socket, mode: str) -> None:
    port = str(listener.getsockname()[1])
    result = serve(served, "--port", port, *(["--train"] if mode == "train" else []))
    options = ["--host", "127.0.0.1", *(["--x-mode", "train"] if mode == "train" else [])]
    *said, given, last = result.stderr.splitlines()
    assert said.count(TOLD) == 1
    toys, python = served / "examples" / "toy", served / ".venv" / "bin" / "python"  # its worker is started as `python`
    assert given == f"{options} {python} {toys} {toys / 'loras'}"
    assert (served / ".cog" / "openapi_schema.json").is_file()
    assert (result.returncode, last) == (1, "The server ended with status 0.")


def test_script_serve_starts_nothing_where_there_is_no_form(served: Path, listener: socket.socket) -> None:
    (served / "predict.py").write_text("")
    result = serve(served, "--port", str(listener.getsockname()[1]))
    assert result.returncode == 1 and "--host" not in result.stderr


def test_a_server_ends_with_the_script_serve_that_is_told_to_stop(served: Path, listener: socket.socket) -> None:
    (served / "cog" / "server" / "http.py").write_text(WAITING)
    command = [sys.executable, served / "script" / "serve", "--port", str(listener.getsockname()[1])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        server = next(int(line.split()[1]) for line in program.stderr if line.startswith("pid "))
        program.terminate()
        assert program.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_finishes_its_work_ends_at_a_second_signal(
    served: Path, listener: socket.socket, stop: signal.Signals
) -> None:
    (served / "cog" / "server" / "http.py").write_text(BUSY)
    command = [sys.executable, served / "script" / "serve", "--port", str(listener.getsockname()[1])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        server = next(int(line.split()[1]) for line in program.stderr if line.startswith("pid "))
        program.send_signal(stop)
        assert "finishing\n" in program.stderr
        program.send_signal(stop)
        program.wait(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(server, signal.SIGKILL)


def test_script_serve_says_that_its_server_has_ended(served: Path, listener: socket.socket) -> None:
    (served / "cog" / "server" / "http.py").write_text(READY_ONCE)
    result = serve(served, "--port", str(listener.getsockname()[1]))
    assert "READY at http://127.0.0.1:" in result.stdout
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "The server ended with status 3.")


def test_script_serve_starts_nothing_where_another_server_would_answer_for_it(
    served: Path, listener: socket.socket
) -> None:
    listener.listen()
    port = listener.getsockname()[1]
    result = serve(served, "--port", str(port))
    *_, last = result.stderr.splitlines()
    assert result.returncode == 1
    assert last == f"Port {port} is taken. Stop what listens there, or name another with --port."
    assert "cog" not in result.stderr and "--host" not in result.stderr
