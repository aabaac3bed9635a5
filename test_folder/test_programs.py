"""Programs of script/ and examples/, which import much only when they are asked for it: all of it is there."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from in_venv import program as module

ROOT = Path(__file__).parents[1]
FILES = [path for path in (ROOT / "script").iterdir() if path.is_file()]
SCRIPTS = [path for path in FILES if b"python" in path.read_bytes().partition(b"\n")[0]]
OURS = ("examples", "klora", "playground", "weights")
LACKING = {"playground": "gradio", "klora.kernels": "triton"}  # what needs a library that is not everywhere


@pytest.mark.parametrize("path", sorted([*SCRIPTS, *(ROOT / "examples").glob("*.py")]), ids=lambda path: path.name)
def test_what_a_program_imports_of_ours_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] not in OURS:
            continue
        lacks = {library for module, library in LACKING.items() if f"{node.module}.".startswith(f"{module}.")}
        if all(map(find_spec, lacks)):
            exec(compile(ast.Module([node], []), path, "exec"), {})


@pytest.mark.parametrize("program", ["serve", "playground"])
@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none_is_refused_before_anything_is_set_up(program: str, port: int) -> None:
    command = [sys.executable, ROOT / "script" / program, "--port", str(port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(f"{program}: error: --port is {port}. Expected 1 to 65535.\n")


@pytest.mark.parametrize(("program", "option", "number"), [("bench", "rounds", 0), ("bench_train", "steps", 10)])
def test_what_leaves_nothing_to_measure_is_refused_before_it_is_timed(program: str, option: str, number: int) -> None:
    command = [sys.executable, ROOT / "script" / program, f"--{option}", str(number)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{program}: error: --{option} is {number}. Expected " in result.stderr


def test_a_toy_lora_of_nothing_that_is_drawn_is_refused() -> None:
    command = [sys.executable, ROOT / "script" / "make-toy-loras", "--only", "cat"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    expected = "robot, flower, blueprint, mosaic, neon"
    assert result.stderr.endswith(f"error: --only is 'cat'. Expected one of {expected}.\n")


def test_an_old_python_gets_no_playground(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    playground = module("playground")
    monkeypatch.setattr(playground, "PLACE", tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(SystemExit, match=r"^Python 3\.10 is too old: 3\.11 or later is needed\.$"):
        playground.enter()
    assert list(tmp_path.iterdir()) == [], "nothing was set up"
