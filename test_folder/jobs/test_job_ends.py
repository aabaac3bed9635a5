"""How a training ends that does not succeed: what it has saved is in its tar, and what it says tells so."""

import locale
import os
import re
import resource
import signal
import stat
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from klora.errors import RequestError
from klora.form.fields import MAX_SEED
from klora.form.request import Request
from klora.training import job, loop, objective
from klora.training.config import TrainConfig
from klora.training.loop import Progress
from klora.training.run import Run
from klora.training.writing import require_place, tarred, whole
from test_folder.jobs.short import held, trained, weights_of
from test_folder.test_card import FACTS

LEFT = "What was learnt is in left.tar, which resume_from takes up."


# Where it is written


def test_the_tars_folder_is_made_and_no_name_is_in_its_way() -> None:
    trained("no/where/robot.part", steps=1)
    assert [path.name for path in Path("no/where").iterdir()] == ["robot.part"]


def test_a_place_is_tried_before_the_training_and_nothing_is_left_there() -> None:
    require_place(Path("no/where/robot.tar"))
    require_place(Path("no/where/robot.tar"))
    assert list(Path("no/where").iterdir()) == []


def test_a_tar_has_its_files_once_each_in_the_order_of_their_names() -> None:
    names = ["b/2", "b/10", "c", "a"]
    for name in names:
        Path("results", name).parent.mkdir(parents=True, exist_ok=True)
        Path("results", name).write_text(name)
    tarred(Path("results"), Path("no/where/robot.tar"))
    with tarfile.open("no/where/robot.tar") as tar:
        members = tar.getmembers()
        told = {member.name: read.read().decode() for member in members if (read := tar.extractfile(member))}
    assert [member.name for member in members] == ["a", "b", "b/10", "b/2", "c"]
    assert told == {name: name for name in names}


@pytest.mark.parametrize("out", ["file/robot.tar", "pictures", "."])
def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_loaded(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "read_upload", None)
    Path("file").touch()
    with pytest.raises(RequestError, match=rf"^out is '{out}', where no file can be made: .* Expected a place"):
        trained(out)


def test_files_that_are_written_at_once_share_no_part_and_their_folder_is_made() -> None:
    with whole(Path("made/dog.v1")) as first, whole(Path("made/dog.v2")) as second:
        first.write_text("1")
        second.write_text("2")
    assert {path.name: path.read_text() for path in Path("made").iterdir()} == {"dog.v1": "1", "dog.v2": "2"}


def test_a_file_that_is_broken_off_leaves_the_one_before_it_and_nothing_else() -> None:
    Path("dog").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(Path("dog")) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert Path("dog").read_text() == "old" and not part.exists()


def test_what_was_learnt_is_kept_where_there_is_no_room_for_its_tar() -> None:
    results = Path("scratch/results")
    results.mkdir(parents=True)
    (results / "run.safetensors").write_bytes(b"learnt" * 1000)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))  # which fails as a full disk does
    try:
        with pytest.raises(RequestError, match=r"What was learnt is in scratch-kept; resume_from takes it as a tar\.$"):
            tarred(results, Path("robot.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert Path("scratch-kept/run.safetensors").read_bytes() == b"learnt" * 1000
    assert stat.S_IMODE(Path("scratch-kept").stat().st_mode) == 0o700  # as the folder that it was in
    assert [*Path("scratch").iterdir()] == [] and not Path("robot.tar").exists()


def test_what_cannot_be_written_nor_taken_away_is_one_sentence() -> None:
    with pytest.raises(RequestError, match=r"^The training could not be written: "), whole(Path("lost/dog")):
        Path("lost").rmdir()
        Path("lost").touch()


def test_a_card_is_written_in_unicode_whatever_the_language_of_the_machine() -> None:
    usual = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        job._write_card(Path(), FACTS | {"prompt": "ein sbu Hündchen"}, "", TrainConfig())
    finally:
        locale.setlocale(locale.LC_CTYPE, usual)
    assert "ein sbu Hündchen" in Path("README.md").read_text("utf-8")
    assert not Path("contact_sheet.png").exists()


def test_a_card_shows_the_samples_of_the_last_step_in_their_order_and_a_sheet_all() -> None:
    Path("samples").mkdir()
    for step, number in ((1, 0), (2, 2), (2, 10), (2, 0)):
        Image.new("RGB", (64, 64)).save(f"samples/step_{step:06}_{number}.png")
    job._write_card(Path(), FACTS, "", TrainConfig(steps=2, sample_prompts="a sbu dog"))
    shown = re.findall(r"step_\w+", Path("README.md").read_text())
    assert shown == ["step_000002_0", "step_000002_2", "step_000002_10"]
    with Image.open("contact_sheet.png") as sheet:
        assert sheet.height > 2 * 192


@pytest.mark.parametrize("size", [(64, 64), (20000, 20000)], ids=["cut short", "a bomb"])
def test_a_sheet_leaves_out_what_is_no_picture(size: tuple[int, int]) -> None:
    """As a tar that is taken up may hold it."""
    Path("samples").mkdir()
    for step, sides in ((1, size), (2, (64, 64))):
        Image.new("1", sides).save(f"samples/step_{step:06}_0.png")
    if size == (64, 64):
        os.truncate("samples/step_000001_0.png", 40)
    job._write_card(Path(), FACTS, "", TrainConfig(steps=2, sample_prompts="a sbu dog"))
    with Image.open("contact_sheet.png") as sheet:
        assert sheet.height > 2 * 192  # a row of each step


# Broken off


def test_what_fails_after_the_last_step_leaves_all_that_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = trained(steps=2)

    def out_of_memory(self: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loop._Loop, "_sample", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trained("left.tar", steps=2, sample_steps=1)
    assert error.value.__notes__ == [LEFT]
    left = held(Path("left.tar"))
    assert weights_of(left) == weights_of(finished)
    assert weights_of(left, "run.safetensors") == weights_of(finished, "run.safetensors")


@pytest.mark.parametrize(
    ("reports", "factor", "said"),
    [
        (4, torch.nan, "The loss is nan at step 3. Expected a number"),
        (4, torch.inf, "The loss is inf at step 3. Expected a number"),
        (1, torch.nan, "What was learnt by step 3 is no number. Expected one"),
    ],
    ids=["reported", "reported as endless", "between two reports"],
)
def test_a_loss_that_is_no_number_leaves_the_last_state_that_is(
    reports: int, factor: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, step = objective.errors, loop._Loop._step

    def wrong_from_3_on(self: Any) -> torch.Tensor:
        if self.run.step == 2:
            monkeypatch.setattr(objective, "errors", lambda *given: right(*given) * factor)
        return step(self)

    monkeypatch.setattr(loop, "REPORTS", reports)
    monkeypatch.setattr(loop._Loop, "_step", wrong_from_3_on)
    with pytest.raises(RequestError) as error:
        trained("left.tar", steps=4, checkpoint_interval=1)
    assert str(error.value) == f"{said}: lower learning_rate. {LEFT}"
    left = held(Path("left.tar"))
    assert left.keys() >= {"checkpoints/lora_000002.safetensors", "config.json", "lora_kohya.safetensors"}
    assert b'"steps":"2"' in left["lora.safetensors"]
    assert all(tensor.isfinite().all() for tensor in load(left["run.safetensors"]).values())


@pytest.mark.parametrize("saving", ["run", "tar", "scratch"])
def test_a_second_interruption_while_one_saves_loses_nothing_and_leaves_nothing(
    saving: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of who presses Ctrl-C twice, or cancels and goes away."""

    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    subjects = {"run": (Run, "save"), "tar": (job, "tarred"), "scratch": (tempfile.TemporaryDirectory, "cleanup")}
    owner, name = subjects[saving]
    right = getattr(owner, name)

    def slow(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return right(*given)

    monkeypatch.setattr(owner, name, slow)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt) as raised:  # whose frames keep the folder from being collected
        trained("left.tar", on_progress=interrupt)
    assert raised and not list(tmp_path.glob("klora-train-*"))
    assert b'"steps":"2"' in held(Path("left.tar"))["lora.safetensors"]


def test_what_fails_before_anything_is_saved_leaves_nothing() -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError("at once")

    with pytest.raises(RuntimeError, match=r"^at once$") as error:
        trained("left.tar", on_progress=fail)
    assert not hasattr(error.value, "__notes__")
    assert [path.name for path in Path().iterdir()] == ["pictures"]


# What is promised at the start


def test_pictures_of_the_class_come_four_at_a_time_each_from_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def drawing(model: None, request: Request) -> list[Image.Image]:
        asked.append(request)
        return [Image.new("RGB", (64, 64))] * request.num_outputs

    monkeypatch.setattr(job, "generate", drawing)
    given = {"class_word": "toy", "num_class_images": 6, "seed": MAX_SEED}
    config = TrainConfig(prior_preservation="class_images", **given)
    made = job._class_pictures(lambda **options: None, config, torch.device("cpu"))  # type: ignore[arg-type]
    drawn = [(request.prompt, request.num_outputs, request.seed) for request in asked]
    assert drawn == [("a toy", 4, MAX_SEED), ("a toy", 2, 3)]
    assert len({picture.name for picture in made}) == 6 and made[0].open().size == (64, 64)


def test_pictures_of_the_class_are_drawn_by_the_base_as_it_will_be_held() -> None:
    asked: dict[str, Any] = {}

    def loading(**options: Any) -> Any:
        asked.update(options)
        raise KeyboardInterrupt

    for precision, held_as in {"bf16": (torch.bfloat16, None), "nf4": (torch.float32, "nf4")}.items():
        config = TrainConfig(prior_preservation="class_images", class_word="toy", precision=precision)
        with pytest.raises(KeyboardInterrupt):
            job._class_pictures(loading, config, torch.device("cpu"))
        assert (asked["dtype"], asked["quantized"]) == held_as
