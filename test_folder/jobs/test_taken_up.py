"""A training that goes on from the tar that one has left: the same training, whatever broke it off, and refused where
it would be another."""

import gzip
import io
import json
import shutil
import signal
import tarfile
from _thread import interrupt_main
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from klora import cli
from klora.errors import RequestError
from klora.training import taken_up
from klora.training.config import TrainConfig
from klora.training.draw import Draw
from klora.training.loop import Progress
from test_folder.fakes.tars import CHAIN, ENDLESS, HOLES, crafted, header
from test_folder.jobs.short import held, klora_train, trained, weights_of
from test_folder.waiting import at_most


def steps_of(tar: Mapping[str, bytes]) -> str:
    """What the LoRA's header says that it was trained for."""
    header = tar["lora.safetensors"]
    return json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["steps"]


# The same training


def test_a_tar_taken_up_again_is_the_same_training(quick: Path) -> None:
    whole = trained(steps=8)
    resumed = trained("rest.tar", steps=8, resume_from=quick)
    assert weights_of(resumed) == weights_of(whole)
    assert weights_of(resumed, "run.safetensors") == weights_of(whole, "run.safetensors")
    assert [json.loads(line)["step"] for line in resumed["train.jsonl"].splitlines()] == list(range(9))


def test_a_folder_that_was_kept_is_taken_up_as_the_tar_that_a_shell_makes_of_it(quick: Path, tmp_path: Path) -> None:
    with tarfile.open(quick) as ours, tarfile.open(tmp_path / "by-hand.tar", "w") as made:
        ours.extractall(tmp_path / "kept")
        made.add(tmp_path / "kept", ".")
    before, again = (taken_up.taken_up(tar, tmp_path / tar.stem) for tar in (quick, tmp_path / "by-hand.tar"))
    assert replace(again, folder=before.folder) == before


def test_all_samples_and_checkpoints_are_taken_up_and_no_other_files(tmp_path: Path) -> None:
    ours = {"samples/step_000002_0.png", "samples/step_010000_12.png", "checkpoints/lora_000002.safetensors"}
    with tarfile.open(tmp_path / "made.tar", "w") as tar:
        for name in (*ours, "lora.safetensors", "samples/../step_000002_0.png", "checkpoints/other.safetensors"):
            (member := tarfile.TarInfo(name)).size = 1
            tar.addfile(member, io.BytesIO(b"-"))
    taken_up._unpack(tmp_path / "made.tar", tmp_path / "earlier")
    files = (path for path in (tmp_path / "earlier").rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path / "earlier").as_posix() for path in files} == ours


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit], ids=["inside a step", "between two"])
def test_an_interruption_leaves_a_tar_that_can_be_taken_up_in_its_place(
    stop: type[BaseException], quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any checkpoint."""
    step = torch.optim.AdamW.step

    def interrupted(self: Any) -> None:
        if [int(state["step"]) for state in self.state.values()][:1] == [3]:
            interrupt_main()
        step(self)

    def stop_at_4(progress: Progress) -> None:
        if progress.step == 4:
            raise stop

    with monkeypatch.context() as patch, pytest.raises(stop):
        if stop is KeyboardInterrupt:
            patch.setattr(torch.optim.AdamW, "step", interrupted)
        trained("left.tar", on_progress=stop_at_4)
    assert steps_of(held(Path("left.tar"))) == "4"
    resumed = trained("left.tar", resume_from=Path("left.tar"))
    assert weights_of(resumed) == weights_of(held(quick))
    assert [path.name for path in Path().iterdir() if path.name != "pictures"] == ["left.tar"]


def test_a_machine_that_is_taken_away_leaves_a_tar_that_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, a little into the run: no setting has to be said again, and nothing that was made is lost."""

    def taken_away(step: int, *_: Any) -> str:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return ""

    options = ("--steps", "4", "--checkpoint-interval", "2", "--sample-interval", "2", "--sample-steps", "1")
    options += ("--sample-prompts", "a sbu toy", "--precision", "fp32")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert klora_train(*options, "--out", "whole.tar").exit_code == 0
        with monkeypatch.context() as patch:
            patch.setattr(cli, "progress_line", taken_away)
            assert klora_train(*options, "--out", "left.tar").exit_code == 143
        again = CliRunner().invoke(cli.app, ["train", "pictures", "--resume-from", "left.tar", "--out", "left.tar"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert again.exit_code == 0, again.output
    whole, resumed = held(Path("whole.tar")), held(Path("left.tar"))
    assert weights_of(resumed) == weights_of(whole)
    assert {"samples/step_000002_0.png", "checkpoints/lora_000002.safetensors"} < resumed.keys() == whole.keys()
    for name in ("config.json", "contact_sheet.png", "README.md"):
        assert resumed[name] == whole[name], name


@pytest.mark.parametrize(
    ("where", "name"),
    [(taken_up, "_write"), (Draw, "batch"), (torch.optim.AdamW, "step")],
    ids=["unpacking", "the first batch", "the first step"],
)
def test_what_is_interrupted_before_it_has_gone_on_leaves_the_tar_as_it_was(
    where: Any, name: str, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(quick, "lora.tar")
    done = getattr(where, name)

    def broken_off(*given: Any, **options: Any) -> Any:
        done(*given, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, broken_off)
    with pytest.raises(KeyboardInterrupt):
        trained("lora.tar", steps=12, resume_from=Path("lora.tar"))
    assert Path("lora.tar").read_bytes() == quick.read_bytes()


def test_names_of_pictures_change_nothing(quick: Path) -> None:
    for old, new in (("red", "z"), ("green", "a"), ("blue", "m")):
        for suffix in (".png", ".txt"):
            Path(f"pictures/{old}{suffix}").rename(f"pictures/{new}{suffix}")
    assert weights_of(trained()) == weights_of(held(quick))


@pytest.mark.parametrize(
    ("was", "step", "given", "steps"),
    [(90, 30, 1000, 90), (90, 90, 1000, 1000), (90, 30, 60, 60), (1233, 1233, 1000, 1233), (1000, 400, 1000, 1000)],
)
def test_steps_at_their_default_are_meant_where_the_training_had_come_to_its_end(
    was: int, step: int, given: int, steps: int
) -> None:
    before = taken_up.TakenUp(Path(), TrainConfig(steps=was), {}, step)
    assert before.config({"steps": given}).steps == steps


@pytest.mark.parametrize(
    "given", [{"lora_rank": 8}, {"lora_alpha": 8.0}, {"trigger_word": "sbu"}, {"instance_prompt": "a sbu subject"}]
)
def test_a_field_that_was_blank_may_be_said_as_it_came_out(given: dict[str, Any]) -> None:
    before = taken_up.TakenUp(Path(), TrainConfig(seed=3), {"rank": 8, "trigger": "sbu", "prompt": "a sbu subject"}, 2)
    assert before.config(given) == replace(before.settings, steps=1000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_rank": 4}, "lora_rank is 4, but resume_from was trained with 8. Expected that."),
        ({"trigger_word": "tok"}, "trigger_word is 'tok', but resume_from was trained with 'sbu'. Expected that."),
        ({"noise_offset": 0.1}, "noise_offset is 0.1, but resume_from was trained with 0.0. Expected that."),
        ({"resolution": "512"}, "resolution is '512', but resume_from was trained with it blank. Expected that."),
    ],
)
def test_another_value_than_a_blank_field_came_to_is_refused(given: dict[str, Any], said: str) -> None:
    before = taken_up.TakenUp(Path(), TrainConfig(seed=3), {"rank": 8, "trigger": "sbu", "prompt": "a sbu subject"}, 2)
    with pytest.raises(RequestError) as refusal:
        before.config(given)
    assert str(refusal.value) == said


def test_what_the_pictures_teach_by_may_not_change_and_what_is_made_of_it_may() -> None:
    before = taken_up.TakenUp(Path(), TrainConfig(seed=3), {}, 2)
    numbers = ("steps", "sample_interval", "sample_steps", "checkpoint_interval", "keep_checkpoints")
    changed = {"sample_prompts": "a dog", "precision": "bf16", "gradient_checkpointing": "on", "compile": "on"}
    changed |= dict.fromkeys(numbers, 9)
    assert before.config(changed) == replace(before.settings, **changed)
    for name in vars(before.settings).keys() - changed.keys():
        with pytest.raises(RequestError, match=f"^{name} is 'other', but resume_from was trained with"):
            before.config({name: "other"})


# Refused

PLAIN = "resume_from cannot be read as a plain tar. Expected the tar of a training, not compressed."


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_rank": 8}, "lora_rank is 8, but resume_from was trained with 4. Expected that."),
        (
            {"upload": "others"},
            "input_images (pictures: 1) is not what resume_from was trained on (pictures: 3). "
            "Expected the same pictures with the same captions.",
        ),
        ({"base": "flux-dev"}, "base_model is 'flux-dev', but resume_from was trained on 'sdxl'. Expected that."),
        ({"steps": 6}, "steps is 6, and resume_from has done 6. Expected more."),
        ({"steps": 6, "trigger_word": " "}, "steps is 6, and resume_from has done 6. Expected more."),
        ({"resume_from": Path("no.tar")}, PLAIN),
        ({"resume_from": Path("pictures")}, PLAIN),
        ({"resume_from": Path("packed.tar.gz")}, PLAIN),
        ({"resume_from": Path("numbers.tar")}, PLAIN),
        ({"resume_from": Path("other.tar")}, "resume_from holds no config.json. Expected the tar of a training."),
    ],
    ids=["rank", "pictures", "base", "steps", "blank", "no tar", "a folder", "packed", "numbers", "another tar"],
)
def test_what_cannot_be_taken_up_is_refused(given: dict[str, Any], said: str, quick: Path) -> None:
    Path("others").mkdir()
    Image.new("RGB", (64, 64), "white").save("others/white.png")
    Path("no.tar").write_bytes(b"no tar")
    Path("packed.tar.gz").write_bytes(gzip.compress(quick.read_bytes(), 1))
    for name, headers in (("other", {}), ("numbers", {"GNU.sparse.size": "many"})):
        with tarfile.open(f"{name}.tar", "w", pax_headers=headers) as tar:
            tar.add("no.tar")
    with pytest.raises(RequestError) as refusal:
        trained("rest.tar", **{"resume_from": quick, "steps": 12} | given)
    assert str(refusal.value) == said
    assert not Path("rest.tar").exists()


CRAFTED = {**ENDLESS, **HOLES, "chain": lambda name: CHAIN, "a terabyte": lambda name: header(name, 1 << 40)}


@pytest.mark.parametrize("member", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_tar_is_refused_at_once_and_unpacks_to_no_more_than_it_is(member: Callable[[str], bytes]) -> None:
    Path("crafted.tar").write_bytes(data := crafted(member("run.safetensors")))
    with at_most(5), pytest.raises(RequestError) as refusal:
        taken_up.taken_up(Path("crafted.tar"), Path("earlier"))
    assert str(refusal.value) == PLAIN
    assert sum(path.stat().st_size for path in Path().glob("earlier/*")) <= len(data)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("config.json", b'{"steps": ', "resume_from holds a config.json that cannot be read. "),
        ("config.json", b'{"steps": 6}', "resume_from holds a config.json without autocaption. "),
        ("config.json", b"[]", "resume_from holds a config.json without autocaption. "),
        ("train.jsonl", b"step 6\n", "resume_from holds a train.jsonl that cannot be read. "),
        ("run.safetensors", b"\1" * 99, "resume_from cannot be taken up: "),
    ],
)
def test_a_damaged_part_is_refused_by_name(name: str, data: bytes, said: str, quick: Path) -> None:
    with tarfile.open("damaged.tar", "w") as tar:
        for member, content in {**held(quick), name: data}.items():
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    with pytest.raises(RequestError) as refusal:
        trained("rest.tar", steps=12, resume_from=Path("damaged.tar"))
    assert str(refusal.value).startswith(said) and "Expected the tar of a training" in str(refusal.value)


def test_what_is_no_file_is_no_part_of_a_training(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, kind in (("config.json", tarfile.SYMTYPE), ("train.jsonl", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere"
            tar.addfile(member)
    with pytest.raises(RequestError, match=r"^resume_from holds no config\.json\."):
        taken_up.taken_up(tmp_path / "odd.tar", tmp_path / "earlier")


def test_samples_of_other_prompts_and_reports_of_steps_that_are_not_saved_are_left_behind(tmp_path: Path) -> None:
    earlier, results, was = tmp_path / "earlier", tmp_path / "results", TrainConfig(seed=1)
    (earlier / "samples").mkdir(parents=True)
    reports = [json.dumps({"step": step}) for step in range(4)]
    (earlier / taken_up.LOG).write_text("\n".join(reports))
    results.mkdir()
    before = taken_up.TakenUp(earlier, was, {}, step=1)
    before.carry(replace(was, sample_prompts="a dog"), results)
    assert not (results / "samples").exists() and (results / taken_up.LOG).read_text().splitlines() == reports[:2]
    before.carry(replace(was, steps=2), results)
    assert (results / "samples").is_dir()
