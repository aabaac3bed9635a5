"""`klora generate`: what it says, its status, and what a signal leaves."""

import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from klora import cli
from klora.bulk.batches import Bulk
from klora.form.request import Request
from klora.studio.provenance import read_provenance
from test_folder.bulk.prompting import OPTIONS, PROMPTS, generated, pictures, written


def test_a_lora_that_is_not_there_in_one_line_of_five(shell: Path) -> None:
    lines: list[dict[str, Any]] = [{"prompt": prompt, "style_lora": "style.safetensors"} for prompt in PROMPTS]
    lines[1]["style_lora"] = "none.safetensors"
    written(shell / "p.jsonl", *lines)
    arguments = ("p.jsonl", "--content-lora", "content.safetensors", "--seed", "3")
    result = generated(*arguments, "--on-error", "skip")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        "2 images made in out.",
        "Not made: line 2: style_lora is 'none.safetensors', but there is no such file, or none that can be read. "
        "Expected the path of a LoRA, or a reference such as hf:owner/name or an https address.",
    ]
    made = read_provenance(shell / "out" / "00002.png")
    assert (made.seed, made.inputs["prompt"], made.loras["style_lora"].reference) == (
        5,
        PROMPTS[2],
        "style.safetensors",
    )
    (shell / "none.safetensors").write_bytes((shell / "style.safetensors").read_bytes())
    result = generated(*arguments)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "1 images made in out, 2 were there before.")


def test_a_bad_file_is_one_line_and_status_one(shell: Path) -> None:
    written(shell / "p.jsonl", '{"prompt": "x", "strength": 2}')
    result = generated("p.jsonl")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: Some lines cannot be used: line 1: 'strength' is no input of a line. ")
    assert result.stderr.count("\n") == 1


def test_help_lists_what_holds_for_all_lines(shell: Path) -> None:
    text = CliRunner().invoke(cli.app, ["generate", "--help"]).stdout
    options = {"--out", *(f"--{item.name.replace('_', '-')}" for form in (Bulk, Request) for item in fields(form))}
    absent = {"--prompt", "--num-outputs", "--report", "--compare", "--sweep"}
    assert {option for option in options if f"{option} " in text} == options - absent


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_made_and_says_how_to_go_on(shell: Path, number: signal.Signals, status: int) -> None:
    written(shell / "p.txt", *(f"prompt {i}" for i in range(40)))
    arguments = ["generate", "p.txt", "--batch-size", "1", *OPTIONS[2:], "--num-inference-steps", "12"]
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT), 1)
            sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
            cli.app(arguments)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    while not (shell / "out" / "00001.json").exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    made = len(pictures(shell / "out"))
    assert 2 <= made < 40
    said = (shell / "said.txt").read_text().splitlines()
    assert said[-1] == f"Interrupted: {made} of 40 are in out. The same command goes on."
    assert {path.suffix for path in (shell / "out").iterdir()} <= {".png", ".txt", ".json"}
