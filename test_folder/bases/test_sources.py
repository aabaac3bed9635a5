"""A base that is one checkpoint file, and the small files of another repository that complete it, come as one."""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from klora.bases.install import ensure_base, listed
from klora.bases.pget import Pget
from klora.bases.table import BASES, Base
from klora.errors import BaseModelError
from test_folder.fakes.base_hub import (
    BASE,
    COMMIT,
    CONFIG,
    FILES,
    INDEX,
    OTHER_COMMIT,
    REPOSITORY,
    TOKEN,
    UNET,
    Hub,
    Server,
    contents,
)  # fmt: skip
from test_folder.fakes.pget import FakePget

AUTHORS, FILE = "authors/one", "One-v1.0.safetensors"
WHOLE = {FILE: os.urandom(400_000), CONFIG: FILES[CONFIG], INDEX: FILES[INDEX]}
SINGLE = Base("sdxl", AUTHORS, OTHER_COMMIT, (FILE,), "MIT", completed_by=replace(BASE, files=("*.json", "*/*.json")))
STATE = Path(".cache", "klora", "state")


@pytest.fixture
def hub(server: Server) -> Hub:
    """With the authors' repository, which has an index of its own that is not wanted, and BASE's."""
    server.hub.publish(SINGLE)
    server.hub.only = {AUTHORS: OTHER_COMMIT, REPOSITORY: COMMIT}
    server.hub.others[AUTHORS] = {FILE: WHOLE[FILE], INDEX: b"another", "README.md": b"read me"}
    return server.hub


# The table.


def test_illustrious_xl_is_one_pinned_file_and_the_small_files_of_sdxl() -> None:
    base, sdxl = BASES["illustrious-xl"], BASES["sdxl"]
    assert base.files == ("Illustrious-XL-v1.0.safetensors",)
    completed_by = base.completed_by
    assert completed_by is not None
    assert (completed_by.repository, completed_by.revision) == (sdxl.repository, sdxl.revision)
    small = ["model_index.json", "unet/config.json", "tokenizer_2/merges.txt", "scheduler/scheduler_config.json"]
    assert all(map(completed_by.wants, small))
    weights = ["unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.safetensors", "sd_xl_base_1.0.safetensors"]
    assert not any(map(completed_by.wants, weights))


def test_what_completes_a_base_has_the_index_and_is_gated_only_with_it() -> None:
    """So that whoever looks at `gated` knows whether a token is needed."""
    completed = [base for base in BASES.values() if base.completed_by]
    assert completed and all(base.sources[-1].wants(INDEX) for base in BASES.values() if base.family)
    assert not [base for base in completed if base.wants(INDEX) or any(s.gated > base.gated for s in base.sources)]


# Both come.


def test_each_file_comes_from_its_own_repository_at_its_own_commit_and_the_index_last(
    hub: Hub, ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "klora.bases")
    assert ensure(SINGLE) == tmp_path / "tiny"
    assert contents(tmp_path / "tiny") == WHOLE
    assert sorted(hub.fetched()) == sorted(WHOLE) and hub.fetched()[-1] == INDEX
    assert caplog.messages[0] == (
        f"tiny: 3 of 3 files to fetch (0.000 GB) from {AUTHORS} at {OTHER_COMMIT} and {REPOSITORY} at {COMMIT}."
    )


def test_the_state_says_of_which_commits_the_files_are(hub: Hub, ensure: Callable[..., Path]) -> None:
    state = ensure(SINGLE) / STATE
    assert state.read_text() == f"{OTHER_COMMIT} {COMMIT} complete"
    hub.asked.clear()
    ensure(SINGLE)
    assert hub.asked == [("GET tree", "", None)] * 2


@pytest.mark.usefixtures("hub")
def test_both_are_counted_before_anything_is_written(server: Server, tmp_path: Path) -> None:
    found = listed("tiny", SINGLE, tmp_path, endpoint=server.address)
    assert found.size == found.missing == sum(map(len, WHOLE.values()))
    assert not (tmp_path / "tiny").exists()
    found.install()
    assert (found.size, found.missing) == (sum(map(len, WHOLE.values())), 0)


def test_another_commit_of_the_small_files_replaces_them_and_keeps_the_checkpoint(
    hub: Hub, ensure: Callable[..., Path], tmp_path: Path
) -> None:
    ensure(SINGLE)
    hub.files = hub.files | {CONFIG: b'{"layers": 3}'}
    hub.only[REPOSITORY] = "f00d" * 10
    hub.commits.add("f00d" * 10)
    hub.asked.clear()
    ensure(replace(SINGLE, completed_by=replace(SINGLE.completed_by, revision="f00d" * 10)))
    assert contents(tmp_path / "tiny") == WHOLE | {CONFIG: b'{"layers": 3}'}
    assert set(hub.fetched()) == {CONFIG, INDEX}


def test_a_token_goes_to_both_repositories_and_never_to_their_storage(hub: Hub, ensure: Callable[..., Path]) -> None:
    ensure(SINGLE, TOKEN)
    assert {token for kind, _, token in hub.asked if kind != "GET storage"} == {f"Bearer {TOKEN}"}
    assert {token for kind, _, token in hub.asked if kind == "GET storage"} == {None}


def test_pget_fetches_the_checkpoint(
    hub: Hub, ensure: Callable[..., Path], fake: FakePget, server: Server, tmp_path: Path
) -> None:
    ensure(SINGLE, pget=Pget(fake.path))
    [run] = fake.runs()
    assert run["argv"][-2] == f"{server.address}/{AUTHORS}/resolve/{OTHER_COMMIT}/{FILE}"
    assert contents(tmp_path / "tiny") == WHOLE


# What goes wrong.


@pytest.mark.parametrize(("lost", "by"), [(FILE, AUTHORS), (CONFIG, REPOSITORY)])
def test_half_of_it_is_not_installed_says_whose_half_is_missing_and_goes_on(
    hub: Hub, ensure: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path, lost: str, by: str
) -> None:
    hub.lost = {lost}
    message = refusal(SINGLE)
    assert message.startswith(f"tiny cannot be fetched from {by}: ")
    assert message.endswith("What has come stays; the next attempt fetches the rest.")
    there = set(contents(tmp_path / "tiny"))
    assert not {INDEX, lost} & there
    assert (FILE in there) == (lost != FILE)
    hub.lost, hub.asked = set(), []
    ensure(SINGLE)
    assert set(hub.fetched()) == set(WHOLE) - there
    assert contents(tmp_path / "tiny") == WHOLE


def test_a_connection_that_breaks_in_the_checkpoint_is_taken_up_where_it_broke(
    hub: Hub, ensure: Callable[..., Path], tmp_path: Path
) -> None:
    hub.broken = {FILE: 1}
    ensure(SINGLE)
    assert (contents(tmp_path / "tiny"), hub.fetched().count(FILE)) == (WHOLE, 2)


def test_a_wrong_byte_of_the_checkpoint_is_refused_and_removed(
    hub: Hub, refusal: Callable[..., str], tmp_path: Path
) -> None:
    damaged = bytes([WHOLE[FILE][0] ^ 1]) + WHOLE[FILE][1:]
    hub.listed = {FILE: {"oid": hashlib.sha256(WHOLE[FILE]).hexdigest()}}
    hub.others[AUTHORS][FILE] = damaged
    assert refusal(SINGLE) == (
        f"{FILE} of tiny came from {AUTHORS} as 400000 bytes with the SHA-256 {hashlib.sha256(damaged).hexdigest()}. "
        f"Expected 400000 bytes with the SHA-256 {hashlib.sha256(WHOLE[FILE]).hexdigest()}."
    )
    assert contents(tmp_path / "tiny") == {}


def test_an_installed_checkpoint_is_checked_by_sha256_where_the_mark_is_gone(
    hub: Hub, ensure: Callable[..., Path], tmp_path: Path
) -> None:
    (ensure(SINGLE) / STATE).unlink()
    (tmp_path / "tiny" / FILE).write_bytes(WHOLE[FILE][::-1])
    hub.asked.clear()
    ensure(SINGLE)
    assert FILE in hub.fetched() and contents(tmp_path / "tiny") == WHOLE


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({AUTHORS: {"README.md": b"moved"}}, f"{AUTHORS} at {OTHER_COMMIT} holds nothing of tiny. Expected {FILE}."),
        (
            {REPOSITORY: {UNET: b"weights", CONFIG: b"{}"}},
            f"{REPOSITORY} at {COMMIT} holds nothing of tiny. Expected a diffusers folder.",
        ),
    ],
)
def test_a_half_that_is_gone_is_refused_before_anything_is_fetched(
    hub: Hub, refusal: Callable[..., str], files: dict[str, dict[str, bytes]], message: str
) -> None:
    hub.others |= files
    assert (refusal(SINGLE), hub.fetched()) == (message, [])


def test_room_for_both_is_there_before_anything_is_fetched(hub: Hub, refusal: Callable[..., str]) -> None:
    hub.listed = {FILE: {"size": 10**18}}
    assert refusal(SINGLE).startswith("tiny needs 1000000000.0 GB more in ")
    assert hub.fetched() == []


@pytest.mark.parametrize("repository", [AUTHORS, REPOSITORY])
def test_a_repository_that_turns_out_gated_is_the_one_that_is_named(
    hub: Hub, server: Server, tmp_path: Path, repository: str
) -> None:
    hub.gated = {repository}
    with pytest.raises(BaseModelError, match=f"^tiny is gated: accept the licence at huggingface.co/{repository} and"):
        ensure_base("tiny", SINGLE, tmp_path, endpoint=server.address)
