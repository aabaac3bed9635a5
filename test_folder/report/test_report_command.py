"""`klora report`: the two files that it writes. What it says, and what it leaves alone, is in test_cli.py."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from klora import cli
from klora.report import Report
from klora.report.pair import save_report
from test_folder.pairs import pair_of
from test_folder.report.reporting import healthy, strictly


@pytest.fixture
def shell(bases, loras, tmp_path, monkeypatch):
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return [str(file.path) for file in pair_of(loras).values()]


def test_its_errors_are_one_line_and_its_bounds_a_requests(shell, loras):
    invoke = CliRunner().invoke
    mixed = invoke(cli.app, ["report", shell[0], str(loras / "flux_style.safetensors")])
    assert (mixed.exit_code, mixed.stderr.count("\n")) == (1, 1) and mixed.stderr.startswith(
        "Error: content_lora was made"
    )
    for option, value in (("--pattern", "t"), ("--style-bias", "11"), ("--alpha", "-1"), ("--steps", "0")):
        assert invoke(cli.app, ["report", *shell, option, value]).exit_code == 2
    assert not Path("out").exists()


def test_another_report_is_written_beside_the_first(shell):
    def reported(steps, option="--steps"):
        result = CliRunner().invoke(cli.app, ["report", *shell, option, steps])
        return result.stdout.splitlines()[-2:]

    first = reported("3")
    assert first == ["out/report.png", "out/report.json"]
    Path("out/report.png").unlink()
    for _ in range(2):  # the same one again has the same files; those of one report have one number
        assert reported("4") == ["out/report-2.png", "out/report-2.json"]
    assert [strictly(Path(f"out/report{number}.json").read_text())["steps"] for number in ("", "-2")] == [3, 4]
    assert reported("3", "--num-inference-steps") == first  # the steps' other name


def test_saving_makes_the_folder(tmp_path):
    assert isinstance(healthy(), Report)
    assert all(path.is_file() for path in save_report(healthy(), tmp_path / "a" / "b"))
