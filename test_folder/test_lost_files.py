"""What a command says where a result cannot be written, and of a LoRA file that cannot be told or is gone: one line."""

import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from klora import cli
from klora.files.shelf import Shelf
from klora.report import inspection

REFUSED = "{} cannot be read or written: {}. Expected a path that can be.\n"
GONE = "{} cannot be read ({}). Expected a LoRA in a .safetensors file.\n"
QUICK = ("--num-inference-steps", "2", "--disable-safety-checker", "--model", "sdxl")
PAIR = ("content.safetensors", "style.safetensors")
VERBS = {
    "fuse": ("fuse", "a dog", "--content-lora", PAIR[0], *QUICK),
    "report": ("report", *PAIR),
    "inspect": ("inspect", PAIR[0]),
    "generate": ("generate", "p.txt", "--content-lora", PAIR[0], *QUICK),
    "export": ("export", *PAIR, "--out", "fused.safetensors"),
    "reproduce": ("reproduce", "made.png"),
}
OUTS = dict.fromkeys(("fuse", "report", "generate", "reproduce"), "afile/sub") | {"export": "afile/sub/x.safetensors"}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture(scope="module")
def made(bases: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two LoRAs, a prompt file and an image that was made of one."""
    folder = tmp_path_factory.mktemp("made")
    for name, role in zip(PAIR, ("content", "style"), strict=True):
        shutil.copy(loras / f"sdxl_{role}.safetensors", folder / name)
    (folder / "p.txt").write_text("a dog\n")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("KLORA_MODELS", str(bases))
        assert run(*VERBS["fuse"], "--seed", "1", "--output-format", "png").exit_code == 0
    (folder / "out" / "klora_1_0.png").rename(folder / "made.png")
    (folder / "out").rmdir()
    return folder


@pytest.fixture
def shell(bases: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all that."""
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("verb", OUTS)
def test_an_out_below_a_file_is_refused_before_any_work(
    shell: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shell / "afile").touch()
    monkeypatch.setattr("weights.LoRAFiles", None)  # nothing is read
    result = run(*VERBS[verb], "--out", OUTS[verb])
    said = f"out is {OUTS[verb]!r}, but {shell / 'afile'} cannot be written to. Expected a path that can be."
    assert (result.exit_code, result.stderr) == (1, f"Error: {said}\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "Error: " + REFUSED.format("A file", "No space left on device"),
        ),
        (OSError("a mistake, and of no file"), ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
    ],
)
def test_what_the_disk_says_is_a_sentence_and_nothing_else_is(
    shell: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(inspection, "inspect", failing)
    result = run(*VERBS["inspect"])
    assert (result.exit_code, result.stderr) == (1, said)


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_that_goes_meanwhile_is_named_in_one_line(
    shell: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    take, files_of = Shelf.take, inspection.files_of
    lora = shell / PAIR[0]
    monkeypatch.setattr(Shelf, "take", lambda *given: (lora.unlink(missing_ok=True), take(*given))[1])
    monkeypatch.setattr(inspection, "files_of", lambda path: (lora.unlink(), files_of(path))[1])
    result = run(*VERBS[verb])
    said = GONE.format(PAIR[0], "No such file or directory")
    line = (result.stdout + result.stderr).splitlines(keepends=True)[-1]
    assert (result.exit_code, line) == (1, f"Not made: line 1: {said}" if verb == "generate" else f"Error: {said}")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_of_two_files_is_named_in_one_line(shell: Path, verb: str) -> None:
    (shell / "two").mkdir()
    for name in PAIR:
        (shell / "two" / name).write_bytes((shell / name).read_bytes())
    arguments = ["two" if part == PAIR[0] else part for part in VERBS[verb]]
    result = run(*arguments, *(["--content-lora", "two"] if verb == "reproduce" else []))
    assert result.exit_code == 1
    [line] = [line for line in (result.stdout + result.stderr).splitlines() if ".safetensors files" in line]
    assert "two cannot be read (a folder of 2 .safetensors files). Expected one" in line


def test_a_command_that_is_terminated_leaves_nothing_half_made(shell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(report: object, folder: Path) -> None:
        (folder / "report.png").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("klora.report.pair.save_report", saved)
    pid = os.fork()
    if pid == 0:
        try:
            cli.app(VERBS["report"])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert not list((shell / "out").iterdir())
