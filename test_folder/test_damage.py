"""A file of the cache that is not what it was is found, set aside and fetched again."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from klora.cache import library
from klora.sources.download import Denied, Unreachable
from test_folder.lending import CONTENT, SIZE, Shop, hub, sha256


def flipped(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)[0]
        file.seek(SIZE // 2)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, SIZE - 1)


def emptied(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, 0)


def linked_elsewhere(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.write_bytes(CONTENT)
    path.unlink()
    path.symlink_to(elsewhere)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("x")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("said", [True, False], ids=["hash known", "hash unknown"])
@pytest.mark.parametrize("again", [False, True], ids=["same process", "new process"])
@pytest.mark.parametrize("damage", [flipped, cut, emptied, linked_elsewhere, a_folder, a_pipe])
def test_a_damaged_blob_is_found_set_aside_and_fetched_again(
    shop: Shop, damage: Callable[[Path], None], again: bool, said: bool
) -> None:
    """K3."""
    if not said:
        shop.authority.has(hub("content"), ("content.safetensors", CONTENT), sha256=None)
    shop.read(hub("content"))
    damage(shop.blob(CONTENT))
    if again:
        shop.reopen()
    assert shop.read(hub("content")) == CONTENT
    assert len(shop.names("quarantine")) == 1
    assert shop.origin.served.total() == 2
    assert shop.read(hub("content")) == CONTENT
    assert shop.origin.served.total() == 2


def test_a_damaged_blob_does_not_serve_for_an_authority_out_of_reach(
    shop: Shop, later: Callable[[float], None]
) -> None:
    shop.read(hub("content"))
    flipped(shop.blob(CONTENT))
    shop.authority.down = True
    later(610)
    with pytest.raises(Unreachable):
        shop.read(hub("content"))


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"files": [], "authorised": [0, 0], "triggers": []}', b"\xff"])
def test_a_damaged_ref_is_none(shop: Shop, text: bytes) -> None:
    shop.read(hub("content"))
    (name,) = shop.names("refs")
    (shop.root / "refs" / name).write_bytes(text)
    assert shop.read(hub("content")) == CONTENT
    assert shop.authority.asked.total() == 2
    assert shop.origin.served.total() == 1


def test_a_ref_of_no_file_is_none(shop: Shop) -> None:
    shop.read(hub("content"))
    [path] = (shop.root / "refs").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": []}))
    assert shop.read(hub("content")) == CONTENT


@pytest.mark.parametrize(("part", "value"), [("name", "../../x"), ("name", ".hidden"), ("sha256", "../refs/x")])
def test_a_ref_that_leads_out_of_its_folder_is_none(shop: Shop, part: str, value: str) -> None:
    shop.read(hub("content"))
    (name,) = shop.names("refs")
    path = shop.root / "refs" / name
    was = {"name": "content.safetensors", "sha256": sha256(CONTENT)}[part]
    path.write_text(path.read_text().replace(f'"{was}"', f'"{value}"'))
    assert shop.store.refs.get(path.stem) is None


def test_a_ref_under_another_refs_name_is_none(shop: Shop) -> None:
    shop.authority.allowed["hf:someone/style"] = {"A"}
    shop.read(hub("style"), hf="A")
    (private,) = shop.names("refs")
    public = library.ref_name("hf:someone/style", "public")
    (shop.root / "refs" / private).rename(shop.root / "refs" / f"{public}.json")
    with pytest.raises(Denied):
        shop.read(hub("style"))
