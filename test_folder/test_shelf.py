"""LoRAs kept in memory, and their scores on disk: what is remembered is what would be computed again."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from klora.errors import LoRAError
from klora.files.shelf import FORM, Shelf, keep_scores
from klora.fusion import fuse, importance
from klora.lora import LoRA, LowRank


def lora(seed: int = 0, rank: int = 2) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return LoRA({name: LowRank(draw(rank, 6), draw(5, rank)) for name in ("first", "second")})


def on_meta(lora: LoRA) -> LoRA:
    return LoRA({name: LowRank(pair.A.to("meta"), pair.B.to("meta")) for name, pair in lora.items()})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"1")
    return path


def test_a_file_is_read_once_for_each_base(file: Path) -> None:
    shelf, reads = Shelf(), []
    read = lambda path: reads.append(path) or lora()  # noqa: E731
    first = shelf.take("sdxl", file, read)
    assert shelf.take("sdxl", file, read) is first
    assert shelf.take("illustrious-xl", file, read) is not first
    assert len(reads) == 2


def test_a_file_that_was_replaced_is_read_again(file: Path, tmp_path: Path) -> None:
    shelf = Shelf()
    first = shelf.take("sdxl", file, lambda path: lora(0))
    (tmp_path / "new").write_bytes(b"2")
    (tmp_path / "new").replace(file)
    second = shelf.take("sdxl", file, lambda path: lora(1))
    file.write_bytes(b"3")
    os.utime(file, (1, 1))
    third = shelf.take("sdxl", file, lambda path: lora(2))
    assert len({id(first), id(second), id(third)}) == 3


def test_names_that_lead_to_one_file_share_it(file: Path, tmp_path: Path) -> None:
    shelf, link = Shelf(), tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert shelf.take("sdxl", file, lambda path: lora()) is shelf.take("sdxl", link, lambda path: lora())


def test_a_file_of_the_cache_is_read_once_however_often_it_is_lent(file: Path, tmp_path: Path) -> None:
    shelf, loans = Shelf(), [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    taken = []
    for loan in loans:
        time.sleep(0.02)  # the clock of files ticks every few milliseconds
        loan.hardlink_to(file)
        taken.append(shelf.take("sdxl", loan, lambda path: lora()))
        loan.unlink()
    assert taken[0] is taken[1]


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    shelf, reads = Shelf(room=2), []
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.touch()
    read = lambda path: reads.append(path.name) or lora()  # noqa: E731
    for index in (0, 1, 0, 2, 0, 1):
        shelf.take("sdxl", paths[index], read)
    assert reads == ["a", "b", "c", "b"]


def test_what_cannot_be_read_is_not_kept(file: Path) -> None:
    shelf = Shelf()
    with pytest.raises(ZeroDivisionError):
        shelf.take("sdxl", file, lambda path: 1 / 0)
    assert shelf.take("sdxl", file, lambda path: lora()).scores == {}


def test_scores_are_kept_again_only_when_there_are_more_or_they_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, place, content, wrote = Shelf(), tmp_path / "content.json", lora(), list[Path]()
    keep = lambda place, lora: wrote.append(place) or keep_scores(place, lora)  # noqa: E731
    monkeypatch.setattr("klora.files.shelf.keep_scores", keep)
    for use in range(2):
        fuse(content, lora(1))
        shelf.keep(place, content)
        assert len(wrote) == 1, use
    fuse(content, lora(1, rank=5))  # no rank of RANKS
    shelf.keep(place, content)
    assert len(wrote) == 2
    stored = place.read_text()
    place.unlink()
    for _ in range(2):
        shelf.keep(place, content)
    assert len(wrote) == 3 and place.read_text() == stored
    shelf.keep(tmp_path / "no folder" / "content.json", content)
    shelf.keep(tmp_path / "no folder" / "content.json", content)
    assert len(wrote) == 5


def test_what_a_file_says_of_itself_is_read_once(file: Path, tmp_path: Path) -> None:
    shelf, link = Shelf(), tmp_path / "link.safetensors"
    link.symlink_to(file)
    with pytest.raises(ZeroDivisionError):
        shelf.origin(file, lambda path: 1 / 0)
    assert shelf.origin(file, lambda path: None) is None
    assert shelf.origin(link, Path.read_text) is None
    file.write_bytes(b"other")
    assert shelf.origin(link, Path.read_text) == shelf.origin(file, lambda path: 1 / 0) == "other"


def test_a_file_that_is_gone_is_a_sentence(file: Path) -> None:
    shelf = Shelf()
    shelf.take("sdxl", file, lambda path: lora())
    file.unlink()
    for use in (lambda: shelf.take("sdxl", file, lambda path: lora()), lambda: shelf.origin(file, lambda path: None)):
        with pytest.raises(LoRAError) as error:
            use()
        assert str(error.value) == (
            "dog.safetensors cannot be read (No such file or directory). Expected a LoRA in a .safetensors file."
        )


def test_a_repository_is_read_again_when_its_alphas_change(tmp_path: Path) -> None:
    """They lie in a file beside the tensors."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("1")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        shelf = Shelf()
        first = shelf.take("sdxl", path, lambda path: lora())
        assert shelf.take("sdxl", path, lambda path: lora()) is first
        (tmp_path / "adapter_config.json").write_text("changed")
        assert shelf.take("sdxl", path, lambda path: lora()) is not first
        (tmp_path / "adapter_config.json").write_text("1")


def test_scores_outlive_the_process_to_the_last_bit(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "scores.json"
    for _ in range(2):  # the second shelf is another process's
        content = Shelf().take("sdxl", file, lambda path: lora(0), place)
        known = {name: dict(sums) for name, sums in content.scores.items()}
        style = lora(1, rank=3)
        fusion = fuse(content, style)
        keep_scores(place, content)
    assert known == content.scores
    for name, pair in content.items():
        assert known[name] == dict(zip(known[name], importance([pair], list(known[name]))[0].tolist(), strict=True))
    plain = fuse(dict(lora(0)), dict(style))
    assert torch.equal(fusion.content_score, plain.content_score) and fusion.gamma == plain.gamma


def test_a_file_known_to_another_process_meets_a_new_partner_without_its_weights(file: Path, tmp_path: Path) -> None:
    """Without them, for on the meta device there is nothing to multiply. Its scores were those for rank 3."""
    places = [tmp_path / "content.json", tmp_path / "style.json"]
    for place, known in zip(places, (lora(0), lora(1, rank=4)), strict=True):
        fuse(known, lora(2, rank=3))
        keep_scores(place, known)
    weightless = [
        Shelf().take("sdxl", file, lambda path, known=known: on_meta(known), place)
        for place, known in zip(places, (lora(0), lora(1, rank=4)), strict=True)
    ]
    fusion, plain = fuse(*weightless), fuse(dict(lora(0)), dict(lora(1, rank=4)))
    assert torch.equal(fusion.content_score, plain.content_score)
    assert torch.equal(fusion.style_score, plain.style_score) and fusion.gamma == plain.gamma


def test_known_scores_are_not_computed_again(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "scores.json"
    place.write_text(
        json.dumps({"form": FORM, "scores": {name: {"6": 7.0, "30": 9.0} for name in ("first", "second")}})
    )
    content = Shelf().take("sdxl", file, lambda path: lora(0), place)
    assert fuse(content, lora(1, rank=3)).content_score.tolist() == [7, 7]


def test_what_two_processes_find_is_kept_together(tmp_path: Path) -> None:
    place, (one, other) = tmp_path / "scores.json", (lora(0), lora(0))
    fuse(one, lora(1, rank=5))
    fuse(other, lora(1, rank=7))
    for known in (one, other):
        keep_scores(place, known)
    reread = Shelf().take("sdxl", place, lambda path: lora(0), place).scores
    assert reread == {name: one.scores[name] | other.scores[name] for name in one}
    assert {10, 14} <= reread["first"].keys()


def test_a_file_of_scores_is_written_for_something_new_only_and_replaced_as_a_whole(tmp_path: Path) -> None:
    place, known = tmp_path / "scores.json", lora(0)
    fuse(known, lora(1))
    keep_scores(place, known)
    first = os.open(place, os.O_RDONLY)  # who has it open reads it to its end
    keep_scores(place, known)
    assert place.stat().st_ino == os.fstat(first).st_ino
    fuse(known, lora(1, rank=5))
    keep_scores(place, known)
    with os.fdopen(first) as old:
        assert "10" not in json.load(old)["scores"]["first"]
    assert "10" in json.loads(place.read_text())["scores"]["first"]
    assert list(tmp_path.iterdir()) == [place]


DAMAGED = (
    "",
    "[]",
    "{",
    "[" * 9999,
    '{"form": 1, "scores": [["first", 6, 7, 9]]}',  # as they were written before
    json.dumps({"form": FORM + 1, "scores": {"first": {"6": 7}}}),
    json.dumps({"form": FORM, "scores": {"first": [6, 7]}}),
    json.dumps({"form": FORM, "scores": {"first": {"six": 7}}}),
    json.dumps({"form": FORM, "scores": {"first": {"6": None}}}),
    json.dumps({"form": FORM, "scores": [["first", 6, 7, 9]]}),
    json.dumps({"form": FORM}),
)


@pytest.mark.parametrize("text", DAMAGED)
def test_scores_that_are_damaged_or_of_another_form_are_computed_again(file: Path, tmp_path: Path, text: str) -> None:
    place = tmp_path / "scores.json"
    place.write_text(text)
    content = Shelf().take("sdxl", file, lambda path: lora(0), place)
    assert content.scores == {}
    fuse(content, lora(1))
    keep_scores(place, content)
    assert Shelf().take("sdxl", file, lambda path: lora(0), place).scores == content.scores


def test_scores_that_cannot_be_written_cost_no_image(file: Path, tmp_path: Path) -> None:
    content = lora(0)
    fuse(content, lora(1))
    keep_scores(tmp_path / "missing" / "scores.json", content)
    assert list(tmp_path.iterdir()) == [file]
