"""`klora fuse` and `klora reproduce`, quick, and the sentence with which the second refuses."""

from pathlib import Path

from typer.testing import CliRunner, Result

from klora import cli

QUICK = ("--num-inference-steps", "3", "--disable-safety-checker", "--seed", "7")


def fuse(*arguments: str) -> None:
    result = CliRunner().invoke(cli.app, ["fuse", "a photo of a dog", *QUICK, *arguments])
    assert result.exit_code == 0, result.stderr


def reproduce(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", *arguments])


def refusal(*arguments: str) -> str:
    result = reproduce(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.stderr
    assert not Path("reproduced").exists()
    return result.stderr.removeprefix("Error: ").strip()
