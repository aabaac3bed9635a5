"""LoRAs kept in memory, and their scores on disk: what is remembered is what would be computed again."""

import json
from pathlib import Path

import pytest
import torch

from klora.fusion import fuse, importance
from klora.lora import LoRA, LowRank
from klora.shelf import Shelf


def lora(seed: int = 0, rank: int = 2) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return LoRA({name: LowRank(draw(rank, 6), draw(5, rank)) for name in ("first", "second")})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"1")
    return path


def nowhere(path: Path) -> None:
    return None


def test_a_file_is_read_once_for_each_base(file: Path) -> None:
    shelf, reads = Shelf(nowhere), []
    read = lambda path: reads.append(path) or lora()  # noqa: E731
    first = shelf.take("sdxl", file, read)
    assert shelf.take("sdxl", file, read) is first
    assert shelf.take("illustrious-xl", file, read) is not first
    assert len(reads) == 2


def test_a_file_that_was_replaced_is_read_again(file: Path, tmp_path: Path) -> None:
    shelf = Shelf(nowhere)
    first = shelf.take("sdxl", file, lambda path: lora(0))
    (tmp_path / "new").write_bytes(b"2")
    (tmp_path / "new").replace(file)
    assert shelf.take("sdxl", file, lambda path: lora(1)) is not first


def test_names_that_lead_to_one_file_share_it(file: Path, tmp_path: Path) -> None:
    shelf, link = Shelf(nowhere), tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert shelf.take("sdxl", file, lambda path: lora()) is shelf.take("sdxl", link, lambda path: lora())


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    shelf, reads = Shelf(nowhere, room=2), []
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.touch()
    read = lambda path: reads.append(path.name) or lora()  # noqa: E731
    for index in (0, 1, 0, 2, 0, 1):
        shelf.take("sdxl", paths[index], read)
    assert reads == ["a", "b", "c", "b"]


def test_what_cannot_be_read_is_not_kept(file: Path) -> None:
    shelf = Shelf(nowhere)
    with pytest.raises(ZeroDivisionError):
        shelf.take("sdxl", file, lambda path: 1 / 0)
    assert shelf.take("sdxl", file, lambda path: lora()).scores == {}


def test_a_folder_is_read_every_time(tmp_path: Path) -> None:
    shelf = Shelf(nowhere)
    assert shelf.take("sdxl", tmp_path, lambda path: lora()) is not shelf.take("sdxl", tmp_path, lambda path: lora())


def test_scores_outlive_the_process_to_the_last_bit(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "scores.json"
    for _ in range(2):  # the second shelf is another process's
        shelf = Shelf(lambda path: place)
        content = shelf.take("sdxl", file, lambda path: lora(0))
        known = dict(content.scores)
        style = lora(1, rank=3)
        fusion = fuse(content, style)
        shelf.keep_scores(file, content)
    assert known == content.scores == {(name, 6): tuple(importance(content[name], 6).tolist()) for name in content}
    plain = fuse(dict(lora(0)), dict(style))
    assert torch.equal(fusion.content_score, plain.content_score) and fusion.gamma == plain.gamma


def test_known_scores_are_not_computed_again(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "scores.json"
    lines = [[name, 6, 7.0, 9.0] for name in ("first", "second")]
    place.write_text(json.dumps({"form": 1, "scores": lines}))
    content = Shelf(lambda path: place).take("sdxl", file, lambda path: lora(0))
    assert fuse(content, lora(1, rank=3)).content_score.tolist() == [7, 7]


DAMAGED = (
    "",
    "[]",
    "{",
    "[" * 9999,
    '{"form": 0, "scores": [["first", 6, 7, 9]]}',
    '{"form": 1, "scores": [["first"]]}',
)


@pytest.mark.parametrize("text", DAMAGED)
def test_scores_that_are_damaged_or_of_another_form_are_computed_again(file: Path, tmp_path: Path, text: str) -> None:
    place = tmp_path / "scores.json"
    place.write_text(text)
    shelf = Shelf(lambda path: place)
    content = shelf.take("sdxl", file, lambda path: lora(0))
    assert content.scores == {}
    fuse(content, lora(1))
    shelf.keep_scores(file, content)
    assert len(json.loads(place.read_text())["scores"]) == 2


def test_scores_that_cannot_be_written_cost_no_image(file: Path, tmp_path: Path) -> None:
    shelf = Shelf(lambda path: tmp_path / "missing" / "scores.json")
    content = shelf.take("sdxl", file, lambda path: lora(0))
    fuse(content, lora(1))
    shelf.keep_scores(file, content)
    assert list(tmp_path.iterdir()) == [file]
