"""`klora inspect` says of a file what the predictor will make of it, without loading a weight of a base."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from klora import cli
from klora.files.report import stated_triggers, tags
from klora.form.request import Request
from klora.models import load_shapes
from klora.models.family import Family
from klora.report.inspection import inspect
from klora.studio import Studio
from test_folder.files.reading import GOOD
from test_folder.pairs import pair_of
from test_folder.tiny import BASES
from test_folder.variants import VARIANTS, Variant


@pytest.mark.parametrize("variant", VARIANTS[3::4], ids=lambda v: f"{v.family}, {v.name}")
def test_what_it_says_is_what_the_base_reads(
    families: dict[str, Family], bases: Path, tmp_path: Path, variant: Variant
) -> None:
    path, meant = variant.write(families[variant.family], tmp_path)
    found = inspect(path, {folder: (family, bases / folder) for family, folder in BASES.items()})
    assert found.fits == (BASES[variant.family],) and not found.refusals
    assert found.report == families[variant.family].read_lora(path).report
    assert found.report.layers == sum(":" not in name for name in meant)
    assert sum(found.report.text_encoders.values()) == sum(":" in name for name in meant)
    assert found.made_for.startswith(families[variant.family].name)


@pytest.mark.parametrize("family", BASES)
def test_shapes_alone_make_the_whole_inventory(families: dict[str, Family], bases: Path, family: str) -> None:
    bare = load_shapes(family, bases / BASES[family])
    assert all(x.is_meta for part in (bare.denoiser, *bare.text_encoders.values()) for x in part.parameters())
    assert bare.inventory == families[family].inventory


def test_the_command_prints_it(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    path = tmp_path / "dog.safetensors"
    tags = {"10_dog": {"a dog": 9, "sks": 20}, "5_dog": {"sks": 3, "grass": 1}}
    save_file(GOOD, path, {"modelspec.trigger_phrase": "zork", "ss_tag_frequency": json.dumps(tags)})
    shown = CliRunner().invoke(cli.app, ["inspect", str(path)])
    assert shown.exit_code == 0
    for said in ("dog.safetensors", hashlib.sha256(path.read_bytes()).hexdigest(), "made for  SDXL", "1 LoRA, rank 2",
                 "none dropped, trigger 'zork'\n", "triggers  'zork'\n",
                 "tags      'sks', 'a dog', 'grass': most often in its captions", "fits      sdxl"):  # fmt: skip
        assert said in shown.output


def test_the_working_folder_is_called_by_its_name(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    (folder := tmp_path / "dog").mkdir()
    monkeypatch.chdir(folder)
    refused = CliRunner().invoke(cli.app, ["inspect", "."])
    assert refused.stderr.startswith("Error: dog cannot be read (a folder of 0 .safetensors files).")
    save_file(GOOD, "adapter_model.safetensors")
    assert CliRunner().invoke(cli.app, ["inspect", "."]).stdout.startswith("file      dog, ")


def test_a_file_that_no_base_reads_says_why(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    path = tmp_path / "dog.safetensors"
    save_file({key: torch.ones(64, 64) for key in GOOD}, path)
    shown = CliRunner().invoke(cli.app, ["inspect", str(path)])
    assert shown.exit_code == 1 and "fits      no installed base" in shown.output
    assert "not sdxl  dog.safetensors was made for another base" in shown.output


def test_a_request_logs_a_line_for_each_lora(bases: Path, loras: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    studio = Studio(lambda *_: ("sdxl", "sdxl", bases / "sdxl"), Path("no-checker"), torch.device("cpu"))
    request = Request("a dog", num_inference_steps=2, disable_safety_checker=True)
    studio.make(request, pair_of(loras))
    for role, rank in (("content", 4), ("style", 8)):
        (line,) = [line for line in caplog.messages if line.startswith(f"{role}_lora: diffusers: ")]
        assert f"rank {rank}" in line and line.endswith("none dropped")


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"a": 3}', '{"a": {"b": "c"}}', "[" * 100_000])
def test_tags_that_make_no_sense_are_no_reason_to_refuse(text: str) -> None:
    metadata = {"ss_tag_frequency": text, "trigger": "sbu"}
    assert (stated_triggers(metadata), tags(metadata)) == (("sbu",), [])


def test_a_tag_of_captions_is_not_said_to_be_a_trigger(sdxl: Family, tmp_path: Path) -> None:
    frequent = {"1_dog": {"sks": 20, "grass": 1}}
    save_file(GOOD, tmp_path / "dog.safetensors", {"ss_tag_frequency": json.dumps(frequent), "instance_prompt": "None"})
    lora = sdxl.read_lora(tmp_path / "dog.safetensors")
    assert (lora.report.triggers, lora.report.tags) == ((), ("sks", "grass"))
    assert str(lora.report).endswith("none dropped") and "trigger" not in lora.metadata
