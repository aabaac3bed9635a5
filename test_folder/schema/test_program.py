"""script/schema as a program: what it writes, what it prints, and what it leaves alone."""

import json
import subprocess
from pathlib import Path

import pytest

from test_folder.schema.project import PROGRAM, ROOT, components, schema, write_project


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), "--root", str(root), *options], capture_output=True, text=True, check=False)


def test_program_writes_the_file_and_one_line(tmp_path: Path) -> None:
    result = run(write_project(tmp_path, 'x: str = Input(description="d")', 'y: int = Input(description="d")'))
    path = tmp_path / ".cog" / "openapi_schema.json"
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{path}: 2 inputs\n", "")
    assert json.loads(path.read_text()) == schema.schema_of(tmp_path)


def test_check_writes_nothing(tmp_path: Path) -> None:
    result = run(write_project(tmp_path, 'x: str = Input(description="d")'), "--check")
    assert result.returncode == 0
    assert not (tmp_path / ".cog").exists()


def test_refusal_is_one_sentence_on_stderr_and_leaves_the_old_file(tmp_path: Path) -> None:
    root = write_project(tmp_path, "x: str = Input()")
    path = root / ".cog" / "openapi_schema.json"
    path.parent.mkdir()
    path.write_text("old")
    result = run(root)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "predict.py:8: input 'x': saw none; accepted: a description on every input.\n"
    assert path.read_text() == "old"


@pytest.mark.skipif(not (ROOT / "predict.py").exists(), reason="predict.py is not written yet")
def test_our_own_form_is_accepted() -> None:
    properties = components(ROOT)["Input"]["properties"]
    assert [field["x-order"] for field in properties.values()] == list(range(len(properties)))
