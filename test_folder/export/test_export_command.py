"""`klora export`."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from klora import cli
from klora.export import exported
from test_folder.export.exporting import header, installed, wanted
from test_folder.pairs import pair_of


def test_the_command_writes_the_file_and_says_how_far_it_is(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.chdir(tmp_path)
    options = {
        "--pattern": "s", "--alpha": "1.2", "--beta": "0.6", "--style-bias": "0.9", "--content-scale": "0.8",
        "--style-scale": "1.1", "--steps": "1:4", "--num-inference-steps": "6", "--rank": "5", "--dtype": "bf16",
    }  # fmt: skip
    given = pair_of(loras, "flux")
    command = ["export", *(str(file.path) for file in given.values()), "--out", "fused.safetensors"]
    result = CliRunner().invoke(cli.app, [*command, *(text for option in options.items() for text in option)])
    assert (result.exit_code, result.stderr) == (0, "")
    asked = wanted(
        pattern="s", alpha=1.2, beta=0.6, style_bias=0.9, content_scale=0.8, style_scale=1.1, steps="1:4",
        num_inference_steps=6, rank=5, dtype="bf16", **{name: str(file.path) for name, file in given.items()},
    )  # fmt: skip
    told = exported(asked, given, installed(bases), Path("again.safetensors"))
    assert result.stdout == f"fused.safetensors\n{told}\n"
    facts = header(Path("fused.safetensors"))["klora_export"]
    assert facts == header(Path("again.safetensors"))["klora_export"]
    applied = {"alpha": 1.2, "beta": 0.6, "style_bias": 0.9, "content_scale": 0.8, "style_scale": 1.1, "rank": 5}
    assert {name: facts[name] for name in applied} == applied
    with safe_open("fused.safetensors", "pt") as one, safe_open("again.safetensors", "pt") as other:
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in other.keys())  # noqa: SIM118


def test_the_command_refuses_in_one_line_and_its_help_says_what_an_average_is_not(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    command = ["export", *(str(file.path) for file in pair_of(loras, "sdxl").values())]
    refused = CliRunner().invoke(cli.app, [*command, "--out", "x.safetensors", "--steps", "2:2"])
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("Error: steps is 2:2.")
    assert CliRunner().invoke(cli.app, command).exit_code == 2  # no --out
    assert list(tmp_path.iterdir()) == []
    text = " ".join(CliRunner().invoke(cli.app, ["export", "--help"]).stdout.split())
    assert "The mean equals K-LoRA only if no layer flips in these steps; otherwise it is different" in text


def test_the_command_overwrites_no_file_least_of_all_one_that_it_reads(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.chdir(tmp_path)
    for role, file in pair_of(loras, "sdxl").items():
        Path(f"{role}.safetensors").write_bytes(file.path.read_bytes())
    content = Path("content_lora.safetensors")
    before = content.read_bytes()
    refused = CliRunner().invoke(cli.app, ["export", str(content), "style_lora.safetensors", "--out", str(content)])
    assert (refused.exit_code, refused.stderr) == (
        1,
        f"Error: out is {str(content)!r}, which is there already. Expected a new name: none is overwritten.\n",
    )
    assert content.read_bytes() == before
