"""The `klora` command: images from a shell, the same as from Python, and errors of one line."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from klora import cli
from klora.form.pictures import open_image
from klora.form.request import Request
from klora.generation import generate
from klora.models.family import Family
from test_folder.pairs import named_pair
from test_folder.report.reporting import strictly
from test_folder.tiny import BASES

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a photo of a dog"
QUICK = ("--num-inference-steps", "3", "--disable-safety-checker", "--output-format", "png")


@pytest.fixture(autouse=True)
def shell(bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder below which the LoRAs are, and the tiny bases installed."""
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    for file in loras.iterdir():
        save_file(load_file(file), tmp_path / file.name)
    monkeypatch.chdir(tmp_path)


def fuse(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["fuse", PROMPT, *arguments])


def generated(model: Family, family: str, **given: Any) -> tuple[list[Image.Image], dict[str, Any]]:
    """What klora.generate makes of the same request, and what it measured."""
    content, style = (model.read_lora(Path(f"{family}_{role}.safetensors")) for role in ("content", "style"))
    facts: dict[str, Any] = {}
    request = Request(prompt=PROMPT, num_inference_steps=3, **given)
    return generate(model, request, content=content, style=style, record=facts.__setitem__), facts


@pytest.mark.parametrize("family", BASES)
def test_images_are_those_of_generate_and_seed_and_share_are_told(families: dict[str, Family], family: str) -> None:
    result = fuse(*named_pair(family), *QUICK, "--seed", "7", "--num-outputs", "2", "--out", "pictures/new")
    images, facts = generated(families[family], family, seed=7, num_outputs=2)
    assert (result.exit_code, result.stderr) == (0, "")
    first, second, told = result.stdout.splitlines()
    assert (first, second) == ("pictures/new/klora_7_0.png", "pictures/new/klora_8_1.png")
    assert re.fullmatch(rf"seed 7, style acts in {facts['style_share']:.0%}, \d+\.\d s", told)
    assert all(np.array_equal(Image.open(path), image) for path, image in zip((first, second), images, strict=True))


def test_every_kind_of_option_reaches_the_request(families: dict[str, Family]) -> None:
    Image.effect_noise((64, 64), 100).save("start.png")
    Image.linear_gradient("L").save("mask.png")
    given = {
        "negative_prompt": "blurry", "content_scale": -0.5, "pattern": "s", "beta": 0.75, "width": 80, "seed": 1,
        "scheduler": "DDIM", "go_fast": True,
    }  # fmt: skip
    named = {name.replace("_", "-"): value for name, value in given.items() if name != "go_fast"}
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    result = fuse(*named_pair("sdxl"), *QUICK, *options, "--go-fast", "--image", "start.png", "--mask", "mask.png")
    pictures = {
        "image": open_image("image", Path("start.png"), "RGB"),
        "mask": open_image("mask", Path("mask.png"), "L"),
    }
    images, facts = generated(families["sdxl"], "sdxl", **given, **pictures)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f", go_fast: {facts['go_fast']}, " in result.stdout.splitlines()[-1]
    assert np.array_equal(Image.open("out/klora_1_0.png"), images[0])


def test_the_seed_that_is_told_makes_the_same_image_again() -> None:
    first = fuse(*QUICK, "--out", "first")
    seed = re.search(r"^seed (\d+), [\d.]+ s$", first.stdout, re.MULTILINE)[1]
    fuse(*QUICK, "--out", "second", "--seed", seed)
    name = f"klora_{seed}_0.png"
    assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_a_picture_whose_name_another_one_has_is_written_beside_it() -> None:
    def drawn(prompt: str, *options: str) -> list[str]:
        result = CliRunner().invoke(cli.app, ["fuse", prompt, *QUICK, "--seed", "7", *options])
        assert result.exit_code == 0, result.stderr
        return result.stdout.splitlines()[:-1]

    assert drawn("a dog") == ["out/klora_7_0.png"]
    first = Path("out/klora_7_0.png").read_bytes()
    for _ in range(2):  # the same request again has the same file
        assert drawn("a dog") == ["out/klora_7_0.png"]
        assert drawn("a cat", "--num-outputs", "2") == ["out/klora_7_0-2.png", "out/klora_8_1.png"]
        assert drawn("a cow") == ["out/klora_7_0-3.png"]
    assert Path("out/klora_7_0.png").read_bytes() == first
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "klora_7_0-2.png", "klora_7_0-3.png", "klora_7_0.png", "klora_8_1.png",
    ]  # fmt: skip


def test_help_lists_every_field_and_out() -> None:
    text = fuse("--help").stdout
    for name in (*(item.name for item in fields(Request)), "out"):
        assert re.search(rf"{'prompt' if name == 'prompt' else '--' + name.replace('_', '-')}\b", text), name


def test_help_shows_what_is_in_brackets() -> None:
    text = CliRunner().invoke(cli.app, ["train", "--help"]).stdout
    assert "Prompt of pictures without a caption, with [trigger] in it." in re.sub(r"[\s│]+", " ", text)


def test_the_installed_command_is_this_one() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="klora")
    assert script.value == "klora.cli:app"


# Errors.


NONE = "but there is no such file, or none that can be read. Expected the path of a LoRA, or a reference such as "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--content-lora", "missing.safetensors"), f"content_lora is 'missing.safetensors', {NONE}"),
        (("--style-lora", "../../x.safetensors"), f"style_lora is '../../x.safetensors', {NONE}"),
        (
            (*named_pair("flux"), "--model", "sdxl"),
            "content_lora was made for FLUX.1, but this request runs sdxl. Expected one for SDXL.",
        ),
        (("--aspect-ratio", "custom"), "aspect_ratio is custom but neither width nor height is given."),
        (("--width", "100"), "width is 100. Expected a multiple of 8 on SDXL."),
        (("--fusion", "style"), "fusion is style but style_lora is not given."),
        ((*named_pair("flux")[:2], "--style-bias", "2"), "style_bias is 2.0 and K-LoRA makes no choice without"),
        (("--image", "sdxl_style.safetensors"), "image cannot be read as an image."),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments: tuple[str, ...], message: str) -> None:
    result = fuse(*QUICK, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_a_missing_checker_is_told(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sdxl").symlink_to(bases / "sdxl")
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))
    assert fuse().stderr.startswith("Error: The safety checker is not installed.")


BASE_COMMANDS = {
    "fuse": (["fuse", PROMPT], "A base model"),
    "fuse on a base": (["fuse", PROMPT, "--model", "flux-dev"], "flux-dev"),
    "fuse flux": (["fuse", PROMPT, *named_pair("flux")], "A base model for flux LoRAs"),
    "train": (["train", "."], "sdxl"),
}


@pytest.mark.parametrize("command", BASE_COMMANDS)
@pytest.mark.parametrize(("folder", "seen"), [("nowhere", "is no folder"), ("empty", "has no base model")])
def test_a_missing_base_is_one_line_that_says_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, folder: str, seen: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path / folder))
    arguments, what = BASE_COMMANDS[command]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith(f"Error: {what} is not installed: {tmp_path / folder} {seen}. Expected ")
    assert f" in {tmp_path / folder / ('sdxl' if command in ('fuse', 'train') else 'flux-dev')}" in result.stderr
    assert result.stderr.endswith("script/make-toy-bases makes toy ones in examples/toy.\n")


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--num-outputs", "5", "less than or equal to 4"),
        ("--num-outputs", "two", "a valid integer"),
        ("--content-scale", "3.01", "less than or equal to 3"),
        ("--content-scale", "nan", "less than or equal to 3"),
        ("--style-bias", "-0.5", "greater than or equal to 0"),
        ("--seed", "-1", "greater than or equal to 0"),
        ("--seed", "4294967296", "less than or equal to 4294967295"),
        ("--width", "63", "greater than or equal to 64"),
        ("--output-format", "gif", "'webp', 'jpg', 'png'"),
        ("--model", "sd-1.5", "'sdxl', 'illustrious-xl', 'flux-dev', 'flux-schnell'"),
        ("--image", "none.png", "'none.png' does not exist"),
        ("--mask", ".", "'.' is a directory"),
    ],
)
def test_a_value_out_of_range_is_refused_naming_the_option(option: str, value: str, accepted: str) -> None:
    result = fuse(*QUICK, option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for '{option}'" in result.stderr
    assert accepted in result.stderr


@pytest.mark.parametrize("option", ["--image", "--mask"])
def test_a_picture_to_reproduce_with_that_is_missing_is_refused_naming_the_option(option: str) -> None:
    Path("klora_7_0.png").touch()
    result = CliRunner().invoke(cli.app, ["reproduce", "klora_7_0.png", option, "none.png"])
    assert f"Invalid value for '{option}'" in result.stderr and "'none.png' does not exist" in result.stderr


def test_an_out_that_is_a_file_is_refused() -> None:
    Path("out").touch()
    assert "'out' is a file" in fuse(*QUICK).stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("style_lora", ("fuse", PROMPT, "--style-lora", "none.safetensors")),
        ("lora", ("inspect", "none.safetensors")),
        ("content_lora", ("report", "none.safetensors", "none.safetensors")),
    ],
)
def test_a_real_process_that_lacks_a_lora_ends_at_once_with_one_line_and_status_one(
    name: str, arguments: tuple[str, ...]
) -> None:
    """Before it imports torch, which takes seconds."""
    told = "atexit.register(lambda: print('torch' in sys.modules))"
    command = [sys.executable, "-c", f"import atexit, sys; {told}; from klora.cli import app; app()", *arguments]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "False\n")
    assert result.stderr.splitlines()[-1].startswith(f"Error: {name} is 'none.safetensors', {NONE}")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse", PROMPT, *QUICK),
        ("inspect", "sdxl_content.safetensors"),
        ("report", *named_pair("sdxl")[1::2]),
        ("export", *named_pair("sdxl")[1::2], "--out", "out/baked.safetensors"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_process_ends_though_nobody_reads_what_it_says(arguments: tuple[str, ...]) -> None:
    """As in `klora fuse ... 2>&1 | head -1`."""
    unread, said = os.pipe()
    os.close(unread)
    command = [sys.executable, "-c", "from klora.cli import app; app()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
        os.close(said)
        try:
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
    assert arguments[0] == "inspect" or any(Path("out").iterdir())


def test_without_bases_a_real_process_draws_and_reports_with_the_toys_says_so_and_touches_nothing_else(
    bases: Path, tmp_path: Path
) -> None:
    """matplotlib only once it draws a report, no pyplot, and nothing in the user's home."""
    shutil.copy(ROOT / "weights.py", tmp_path)  # it looks for the toys beside itself
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "toy").symlink_to(bases)
    (home := tmp_path / "home").mkdir()
    unset = ("KLORA_MODELS", "KLORA_CACHE", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    code = (
        "import os, sys; from klora.cli import app\n"
        "at = sys.argv.index('report')\n"
        "app(sys.argv[1:at], standalone_mode=False)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "app(sys.argv[at:], standalone_mode=False)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'MPLCONFIGDIR' not in os.environ\n"
    )
    command = [sys.executable, "-c", code, "fuse", PROMPT, *named_pair("sdxl"), *QUICK, "--seed", "1"]
    command += ["report", *named_pair("sdxl")[1::2], "--pattern", "s", "--steps", "7", "--beta", "0.6"]
    command += ["--style-bias", "1.5", "--out", "told"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = strictly(Path("told/report.json").read_text())
    assert (told["pattern"], told["steps"], told["beta"], told["style_bias"]) == ("s", 7, 0.6, 1.5)
    assert Image.open("told/report.png").width >= 1200
    assert "\nklora s alpha 1.5 beta 0.6 style_bias 1.5 steps 7: " in result.stdout
    assert all(f"warning: {text}" in result.stdout for text in told["warnings"]) and told["warnings"]
    assert result.stdout.splitlines()[-2:] == ["told/report.png", "told/report.json"]
    assert list(home.iterdir()) == [] and "font" not in result.stderr
    assert "No base models in ~/.cache/klora/models: using the toy ones in examples/toy" in result.stderr
    assert f"loaded sdxl from {tmp_path}/examples/toy/sdxl" in result.stderr
    assert result.stdout.startswith("out/klora_1_0.png\n")
    assert "requires torchvision" not in result.stderr  # transformers tells of what nobody here needs
