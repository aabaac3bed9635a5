"""A training from an upload to its tar, also by the `klora` command: what it leaves, and what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import weights
from klora import load_model
from klora.errors import RequestError
from klora.training.cache import encode_pictures
from klora.training.config import TrainConfig
from test_folder.jobs.short import entered, held, klora_train, trained, weights_of
from test_folder.trainer.material import CPU, SETTINGS, picture, png


@pytest.fixture(scope="module")
def without(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """By base, what a few steps teach where nothing is to be kept of the class."""
    with pytest.MonkeyPatch.context() as patch:
        entered(tmp_path_factory.mktemp("without"), bases, patch)
        return {base: weights_of(trained(class_word="toy", steps=3, base=base)) for base in ("sdxl", "flux-dev")}


# What it leaves


def test_the_command_trains_from_a_zip_what_is_trained_from_a_folder(quick: Path) -> None:
    shutil.make_archive("zipped", "zip", "pictures")
    result = klora_train("--out", "first.tar", upload="zipped.zip")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert "100%|" in result.stdout and "it/s" in result.stdout and result.stdout.splitlines()[-1] == "first.tar"
    assert weights_of(held(Path("first.tar"))) == weights_of(held(quick))
    assert sorted(path.name for path in Path().iterdir()) == ["first.tar", "pictures", "zipped.zip"]


def test_the_lora_says_what_it_is_and_no_file_says_more_than_it_should() -> None:
    tar = trained(class_word="toy", sample_steps=1)
    Path("lora.safetensors").write_bytes(tar["lora.safetensors"])
    with safe_open("lora.safetensors", "pt") as file:
        metadata, dtypes = file.metadata(), {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    meant = {"base": "sdxl", "trigger": "sbu", "rank": "4", "lora_targets": "attention", "steps": "6", "seed": "3"}
    assert meant.items() <= metadata.items()
    assert len(metadata["dataset"]) == len(metadata["modules_sha256"]) == 64
    assert dtypes == {torch.float16}
    facts = json.loads(tar["config.json"])
    assert (facts["rank"], facts["learning_rate"], facts["pictures"]) == (4, 1e-3, 3)
    base = weights.BASES["sdxl"]
    assert facts["repository"] == metadata["repository"] == base.repository
    assert f"is under the {base.licence}, and so is this LoRA" in tar["README.md"].decode()
    for name in ("README.md", "config.json", "lora.safetensors", "lora_kohya.safetensors", "train.jsonl"):
        assert b"a red" not in tar[name] and b"red.png" not in tar[name], name  # captions and file names
    with tarfile.open("lora.tar") as packed:
        assert {(member.uid, member.gid, member.uname, member.gname) for member in packed} == {(0, 0, "", "")}
    lines = [json.loads(line) for line in tar["train.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[0]["loss"] is None and lines[0]["fixed_loss"] > 0 and lines[-1]["steps_per_second"] > 0
    assert (lines[0]["seconds_left"], lines[-1]["seconds_left"]) == (None, 0)


def test_what_an_expression_chose_is_not_said_to_be_the_choice_of_layers_it_replaced() -> None:
    tar = trained(layers_to_optimize_regex=r"^unet\..*to_q$", steps=1, lora_rank=None, learning_rate=None)
    Path("lora.safetensors").write_bytes(tar["lora.safetensors"])
    with safe_open("lora.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["layers_to_optimize_regex"], told["lora_targets"]) == (r"^unet\..*to_q$", "")
    assert (told["rank"], told["learning_rate"]) == ("8", "5e-05")  # the base's
    card = tar["README.md"].decode()
    assert r"| layers_to_optimize_regex | `^unet\..*to_q$` |" in card and "lora_targets" not in card


def test_kohyas_file_is_the_same_lora(bases: Path, quick: Path) -> None:
    tar = held(quick)
    for name in ("lora", "lora_kohya"):
        Path(f"{name}.safetensors").write_bytes(tar[f"{name}.safetensors"])
    model = load_model("sdxl", bases / "sdxl", CPU)
    ours, kohyas = (model.read_lora(Path(f"{name}.safetensors")) for name in ("lora", "lora_kohya"))
    assert ours.keys() == kohyas.keys() and ours.metadata.items() <= kohyas.metadata.items()
    assert all(torch.equal(ours[n].B @ ours[n].A, kohyas[n].B @ kohyas[n].A) for n in ours)


# Refused


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a limit on the size of files, which fails as a full disk does."""
    scratch = tmp_path_factory.mktemp("scratch")  # of its own: other tests train in the usual one at the same time
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, usual[1]))
    try:
        ended = klora_train("--out", "lora.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert ended.exit_code == 1
    assert ended.stderr.splitlines()[-1].startswith("Error: The training could not be written: ")
    assert [path.name for path in Path().iterdir()] == ["pictures"]
    assert [*scratch.glob("klora-train-*")] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", "0"), "--steps"),
        (("--resolution", "big"), "Error: resolution is 'big'"),
        (("--mask-mode", "clipseg", "--class-word", "toy"), "Error: The segmenter is not installed"),
        (
            ("--mask-mode", "provided"),
            "Error: mask_mode is provided, and no picture has a mask. Expected NAME.mask.png",
        ),
        (("--hf-repo-id", "me/dog"), "Error: hf_repo_id is 'me/dog' but hf_token is not given. Give it, too."),
        (("--hf-repo-id", "dog", "--hf-token", "hf_x"), "Error: hf_repo_id is 'dog'. Expected owner/name"),
        (("--wandb-api-key", "secret"), "Error: wandb_api_key is given and wandb is not installed."),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(options: tuple[str, ...], said: str) -> None:
    result = klora_train(*options)
    assert result.exit_code != 0
    assert said in result.stderr and "secret" not in result.output
    assert [path.name for path in Path().iterdir()] == ["pictures"]


def test_the_command_overwrites_no_training_but_the_one_that_goes_on(quick: Path) -> None:
    shutil.copy(quick, "trained_model.tar")
    shutil.copy(quick, "other.tar")
    for options in ((), ("--resume-from", "other.tar", "--steps", "12")):
        result = klora_train(*options)
        assert (result.exit_code, result.stderr) == (
            1,
            "Error: out is 'trained_model.tar', which is there already. Expected a new name: none is overwritten.\n",
        )
        assert Path("trained_model.tar").read_bytes() == quick.read_bytes()


# Captions, masks, the class


def test_autocaption_without_a_model_is_skipped_and_says_so(quick: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Path("pictures/notes.md").write_text("-")
    assert weights_of(trained(autocaption=True, mask_prompt="toy")) == weights_of(held(quick))
    assert "mask_prompt changes nothing: mask_mode is 'none'" in caplog.messages
    assert "skipped notes.md: is no image that is known here" in caplog.messages
    assert any(line.startswith("autocaption is skipped: ") for line in caplog.messages)
    assert "3 of 3 pictures have a caption; one without is called 'a sbu subject'" in caplog.messages


def test_files_that_are_left_out_for_one_reason_are_one_line_that_names_the_first(
    quick: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A Mac's zip has a hidden file for every picture."""
    caplog.set_level("INFO")
    for name in (*(f"._{number}.png" for number in range(23)), "a.heic", "b.heic"):
        Path("pictures", name).write_bytes(b"-")
    Image.new("L", (8, 8)).save("pictures/tiny.png")
    trained()
    hidden = ", ".join(f"._{number}.png" for number in range(20))
    assert [line for line in caplog.messages if line.startswith("skipped")] == [
        f"skipped {hidden}, 3 more: each is hidden or a system's, not yours",
        "skipped a.heic, b.heic: each is no image that is known here",
        "skipped tiny.png: is 8x8, smaller than 64 pixels",
    ]


def test_a_mask_makes_another_lora_and_what_is_outside_does_not_count(
    bases: Path, quick: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, mask = load_model("sdxl", bases / "sdxl", CPU), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 36, 64))
    shown = [picture(0, "red", mask=mask), picture(0, "red")]
    for least in (0.0, 0.25):
        given = SETTINGS | {"mask_mode": "provided", "mask_min_weight": least}
        examples = encode_pictures(model, shown, ["a toy"] * 2, TrainConfig(**given))
        masked, whole = (example.views[0].mask[0] for example in examples)
        assert torch.equal(masked, torch.tensor([1.0] * 4 + [0.5] + [least] * 3).expand(8, 8)) and whole.eq(1).all()
    Path("pictures/red.mask.png").write_bytes(png(mask))
    assert weights_of(trained(mask_mode="provided")) != weights_of(held(quick))
    assert "1 of 3 pictures have a mask" in caplog.messages
    Image.new("L", (64, 64)).save("pictures/red.mask.png")
    with pytest.raises(RequestError, match=r"^The mask of 'red\.png' is black in all that is kept of it\. Expected"):
        trained(mask_mode="provided", mask_min_weight=0.0)


@pytest.mark.parametrize("base", ["sdxl", "flux-dev"])
@pytest.mark.parametrize("kind", ["output", "class_images"])
def test_prior_preservation_makes_another_lora(
    base: str, kind: str, without: Mapping[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given = {"prior_preservation": kind, "class_word": "toy", "num_class_images": 2, "steps": 3}
    kept = trained(**given, base=base)
    assert weights_of(kept) != without[base]
    if base == "sdxl":  # what decides it knows no base
        again = {"output": {"prior_loss_weight": 0.0}, "class_images": {}}[kind]
        assert weights_of(trained(**given | again)) == (without[base] if again else weights_of(kept))
    assert ("2 pictures of 'a toy' by the base" in caplog.messages) == (kind == "class_images")


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("a sbu dog on a beach", "a dog on a beach"),
        ("sbu, a beach", "dog, a beach"),
        ("a sbuffer", "a sbuffer"),
        ("a sbu dogma", "a dog dogma"),
        ("a man in sbu style, from above", "a man, from above"),
        ("a man, in sbu style.", "a man."),
        ("In sbu style, a man", "a man"),
        ("a man in sbu styles", "a man in dog styles"),
    ],
)
def test_a_kept_caption_has_the_class_word_in_the_triggers_place(caption: str, kept: str) -> None:
    assert TrainConfig(class_word="dog").kept_caption(caption) == kept


def test_a_class_word_is_text_and_no_template() -> None:
    assert TrainConfig(class_word="AC\\DC").kept_caption("a sbu AC\\DC shirt") == "a AC\\DC shirt"
    assert TrainConfig(class_word="\\1").kept_caption("a sbu shirt") == "a \\1 shirt"


def test_the_prompt_of_pictures_without_caption_has_the_trigger_which_is_not_kept() -> None:
    config = TrainConfig(instance_prompt="a [trigger] dog", class_word="dog", prior_preservation="output")
    assert (config.prompt, config.kept_caption(config.prompt)) == ("a sbu dog", "a dog")
    assert TrainConfig(instance_prompt="a zwx dog", trigger_word="zwx").prompt == "a zwx dog"


# Several processes


def test_two_processes_are_one_with_twice_the_accumulation() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # --multi_gpu is what makes it start processes; without GPUs they run on the CPU and talk by gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += [str(Path(sys.executable).parent / "klora"), "train"]
    # Without a seed: the random one of the first process is the other's, too.
    named = {f"--{name.replace('_', '-')}": str(value) for name, value in SETTINGS.items() if name != "seed"}
    settings = [text for option in named.items() for text in option]
    command = [*launch, "pictures", "--out", "two.tar", *settings, "--gradient-accumulation-steps", "2", "--steps", "3"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    two = held(Path("two.tar"))
    one = trained(gradient_accumulation_steps=4, steps=3, seed=json.loads(two["config.json"])["seed"])
    losses = [[json.loads(line)["loss"] for line in tar["train.jsonl"].splitlines()] for tar in (two, one)]
    np.testing.assert_allclose(losses[0][1:], losses[1][1:], rtol=1e-5)
    for name, tar in (("two", two), ("one", one)):
        Path(f"{name}.safetensors").write_bytes(tar["lora.safetensors"])
    with safe_open("two.safetensors", "pt") as ours, safe_open("one.safetensors", "pt") as theirs:
        for key in theirs.keys():  # noqa: SIM118
            torch.testing.assert_close(ours.get_tensor(key), theirs.get_tensor(key), rtol=1e-2, atol=1e-5)
