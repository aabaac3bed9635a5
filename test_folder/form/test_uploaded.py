"""What Cog hands over: a blank field is none, an upload a file of its own; by servers: conformance/test_files.py."""

import tempfile
from pathlib import Path

import pytest

from klora.errors import RequestError
from klora.form.inputs import filled, uploaded


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, with an upload in it, beside a file that is none."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "tmp01234567dog.zip").touch()
    (tmp_path / "secret").touch()
    (tmp_path / "tmp" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_a_blank_field_is_not_given_and_nought_and_false_are() -> None:
    given = {"seed": 0, "prompt_strength": 0.0, "add_triggers": False}
    assert filled(given | {"model": None, "style_lora": ""}) == given


def test_a_file_that_was_fetched_is_taken(scratch: Path) -> None:
    assert uploaded("image", scratch / "tmp01234567dog.zip") == (scratch / "tmp01234567dog.zip").resolve()


def test_the_temporary_folder_may_be_behind_a_link(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    alias = scratch.parent / "alias"
    alias.symlink_to(scratch)
    monkeypatch.setattr(tempfile, "tempdir", str(alias))
    assert uploaded("image", alias / "tmp01234567dog.zip") == (scratch / "tmp01234567dog.zip").resolve()


@pytest.mark.parametrize("name", [".", "lost.zip", "link", "../secret"])
def test_a_folder_a_lost_file_and_one_from_elsewhere_are_refused(scratch: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"^image is '.*'\. Expected an uploaded file"):
        uploaded("image", scratch / name)


def test_a_bare_text_is_no_upload_wherever_it_leads(scratch: Path) -> None:
    with pytest.raises(RequestError, match="Expected an uploaded file"):
        uploaded("prompts", str(scratch / "tmp01234567dog.zip"))


def test_a_picture_that_is_sent_as_bare_base64_is_not_sent_back(scratch: Path) -> None:
    with pytest.raises(RequestError, match=r"^image is 'iVBORw0KGgo") as refusal:
        uploaded("image", "iVBORw0KGgo" + 100_000 * "A")
    assert str(refusal.value).endswith("A. Expected an uploaded file, an http(s) URL or a data URI.")
    assert len(str(refusal.value)) < 300
