"""The server's disk and processes: requests read no files but uploads, and leave nothing behind."""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from test_folder.conformance.client import Client
from test_folder.conformance.local import Place
from test_folder.conformance.payloads import data_uri, encoded, gradient

PNG = data_uri(encoded(gradient()), "image/png")
KINDS: list[dict[str, Any]] = [
    {"num_outputs": 2},
    {"image": PNG, "prompt_strength": 1},
    {"image": PNG, "mask": PNG, "prompt_strength": 1},
    {"prompt": " ", "image": PNG},
    {"image": "data:image/png;base64,AAAA"},
]
COG = Path("/tmp/coglet/predictions")  # where Cog makes folders for every request, and never removes them


def after(predictor: Client, count: int) -> list[str]:
    """Ids of so many requests, of every kind in turn, the last of which succeeds."""
    kinds = [*islice(cycle(KINDS), count - 1), {"num_outputs": 1}]
    return [predictor.predict(**predictor.mode.quick | kind)["id"] for kind in kinds]


@pytest.mark.local
def test_after_many_requests_only_the_last_ones_images_are_there(predictor: Client, place: Place) -> None:
    before = set(place.files())
    after(predictor, 10)
    assert [path.name for path in place.files() if path not in before or "klora_" in path.name] == ["klora_7_0.png"]


@pytest.mark.local
def test_cog_is_left_with_no_files_of_ours(predictor: Client) -> None:
    names = after(predictor, 5)
    assert not [path for name in names for path in (COG / name).rglob("*") if path.is_file()]


@pytest.mark.local
def test_a_cancelled_request_leaves_no_files(predictor: Client, place: Place) -> None:
    before = len(place.files())
    predictor.begin("leaves-nothing")
    predictor.cancel("leaves-nothing")
    predictor.wait_until_ready()
    assert len(place.files()) <= before


@pytest.mark.local
def test_requests_leave_no_processes_and_no_open_files(predictor: Client) -> None:
    def count() -> tuple[int, int, int]:
        mine = psutil.Process().children(recursive=True)
        return len(mine), sum(one.num_threads() for one in mine), sum(len(one.open_files()) for one in mine)

    after(predictor, 5)
    predictor.wait_until_ready()
    before = count()
    after(predictor, 10)
    predictor.wait_until_ready()
    assert count()[::2] == before[::2]
    assert count()[1] <= before[1] + 2  # threads that wait for more work come and go


PATHS = ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "/proc/self/environ", "predict.py", "."]


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize("path", PATHS)
def test_a_file_of_the_server_is_no_upload(predictor: Client, name: str, path: str) -> None:
    """Cog takes a bare text for a path, and would open it."""
    said = predictor.refusal(**predictor.mode.quick | {"image": PNG} | {name: path})
    assert said.startswith(f"{name} is {path!r}. Expected an uploaded file")


@pytest.mark.parametrize("name", ["input_images", "resume_from"])
@pytest.mark.parametrize("path", ["/etc/passwd", "examples/zips/robot.zip"])
def test_a_file_of_the_trainer_is_no_upload(trainer: Client, name: str, path: str) -> None:
    said = trainer.refusal(**trainer.mode.quick | {name: path})
    assert said.startswith(f"{name} is {path!r}. Expected an uploaded file")


@pytest.mark.local
@pytest.mark.parametrize("name", ["image", "mask", "prompts"])
def test_a_file_where_uploads_are_put_is_none_by_its_name(predictor: Client, place: Place, name: str) -> None:
    secret = place.temporary / "tmp01234567secret.txt"  # as Cog names what it fetches
    secret.write_text("a secret")
    said = predictor.refusal(**predictor.mode.quick | {"prompt": "{}", "image": PNG} | {name: str(secret)})
    assert said == f"{name} is {str(secret)!r}. Expected an uploaded file, an http(s) URL or a data URI."


@pytest.mark.local
def test_a_folder_where_uploads_are_put_is_none(trainer: Client, training_place: Place) -> None:
    (training_place.temporary / "pictures").mkdir(exist_ok=True)
    (training_place.temporary / "pictures" / "0.png").write_bytes(encoded(gradient()))
    for folder in (training_place.temporary, training_place.temporary / "pictures"):
        said = trainer.refusal(**trainer.mode.quick | {"input_images": str(folder)})
        assert said.startswith(f"input_images is {str(folder)!r}. Expected an uploaded file")


@pytest.mark.parametrize("path", ["/etc/passwd", "../predict.py", "~/.ssh/id_rsa", "/models/sdxl/model_index.json"])
def test_a_file_of_the_server_is_no_lora(predictor: Client, path: str) -> None:
    said = predictor.refusal(**predictor.mode.quick, content_lora=path)
    assert "content_lora" in said and "root:" not in said
