"""pget fetches the large public files of a base, and what it fails at the hub's client fetches."""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from klora.bases.pget import Pget, PgetError, find_pget
from klora.bases.table import Base
from klora.errors import BaseModelError
from test_folder.fakes.base_hub import (
    BASE,
    COMMIT,
    CONFIG,
    FILES,
    GATED,
    INDEX,
    REPOSITORY,
    TOKEN,
    UNET,
    VAE,
    Hub,
    Server,
    contents,
    leftovers,
)  # fmt: skip
from test_folder.fakes.pget import FakePget, is_running
from test_folder.waiting import soon

# By pget.


def test_pget_fetches_the_large_files_and_the_client_the_small_ones(
    hub: Hub, ensure: Callable[..., Path], fake: FakePget, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "klora.bases")
    ensure(pget=Pget(fake.path))
    assert contents(tmp_path / "tiny") == FILES
    by = {line.split()[1].rstrip(","): line.split()[-1] for line in caplog.messages if " bytes in " in line}
    assert by == {UNET: "pget.", VAE: "pget.", CONFIG: "huggingface_hub.", INDEX: "huggingface_hub."}
    assert sorted(hub.fetched("GET storage")) == sorted([UNET, VAE])
    assert leftovers(tmp_path) == []


def test_pget_is_given_a_fresh_path_a_lock_of_its_own_and_no_environment(
    ensure: Callable[..., Path], fake: FakePget, server: Server, tmp_path: Path
) -> None:
    ensure(pget=Pget(fake.path))
    runs = fake.runs()
    assert sorted(run["argv"][-2] for run in runs) == sorted(
        f"{server.address}/owner/tiny/resolve/{COMMIT}/{path}" for path in (UNET, VAE)
    )
    paths = {word for run in runs for word in run["argv"] if word.startswith(str(tmp_path))}
    assert len(paths) == 4  # a file and a lock each
    assert all(Path(path).parent == tmp_path / "tiny" / ".cache" / "klora" for path in paths)
    assert all(not {"HF_TOKEN", "PATH", "HOME"} & run["environ"].keys() for run in runs)


@pytest.mark.parametrize(("base", "token"), [(BASE, TOKEN), (GATED, TOKEN)])
def test_pget_never_runs_with_a_token_about(
    hub: Hub, ensure: Callable[..., Path], fake: FakePget, base: Base, token: str, tmp_path: Path
) -> None:
    hub.gated = {REPOSITORY} if base.gated else set()
    ensure(base, token, Pget(fake.path))
    assert (fake.runs(), contents(tmp_path / "tiny")) == ([], FILES)


def test_pget_never_runs_for_a_gated_base(hub: Hub, refusal: Callable[..., str], fake: FakePget) -> None:
    hub.gated = {REPOSITORY}
    assert refusal(GATED, None, Pget(fake.path)).startswith("tiny is gated: ")
    assert fake.runs() == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("wrong", "as 50000 bytes with the SHA-256 "),
        ("partial", "it ended with status 1"),
        ("nothing", "as 0 bytes. Expected 50000 bytes with the SHA-256 "),
    ],
)
def test_what_pget_fails_the_client_fetches(
    ensure: Callable[..., Path], fake: FakePget, caplog: pytest.LogCaptureFixture, tmp_path: Path, how: str, said: str
) -> None:
    """P4, too: of a part that pget leaves nothing is used."""
    fake.behave(how)
    ensure(pget=Pget(fake.path))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    failed = next(line for line in warnings if f"not fetched {VAE}" in line)
    assert failed.startswith(f"tiny: pget has not fetched {VAE}, huggingface_hub will: ")
    assert said in failed
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


def test_a_pget_that_hangs_is_killed_with_its_whole_group(
    ensure: Callable[..., Path], fake: FakePget, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """P3"""
    fake.behave("hang")
    began = time.monotonic()
    ensure(pget=Pget(fake.path, patience=2))
    assert time.monotonic() - began < 30  # pget would take 60
    pids = [pid for run in fake.runs() for pid in run["pids"]]
    assert pids
    assert soon(lambda: not any(map(is_running, pids)))
    assert "huggingface_hub will: it took more than 2 s" in caplog.text
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


def test_a_pget_that_cannot_be_run_is_no_obstacle(ensure: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "pget").write_text("")
    ensure(pget=Pget(tmp_path / "pget"))
    assert contents(tmp_path / "tiny") == FILES


def test_a_large_file_takes_its_time(fake: FakePget, tmp_path: Path, server: Server) -> None:
    """The patience is beside the time for the size: a second for 5 MB."""
    fake.behave("hang")
    began = time.monotonic()
    with pytest.raises(PgetError, match=r"^it took more than 1 s$"):
        Pget(fake.path, patience=0.01).fetch(
            f"{server.address}/storage/{REPOSITORY}/{VAE}", tmp_path / "part", 5_000_000
        )
    assert 0.9 < time.monotonic() - began < 30


# Which pget.


def test_without_pget_there_is_none_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """P1"""
    caplog.set_level(logging.INFO)
    assert find_pget("ab" * 32, str(tmp_path / "pget")) is None
    assert caplog.messages == ["pget is not installed: huggingface_hub fetches the base models."]


def test_a_pget_of_the_pinned_bytes_is_found_on_the_path(fake: FakePget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"/nowhere:{fake.path.parent}")
    assert find_pget(fake.sha256.upper() + "\n") == Pget(fake.path)


def test_a_pget_of_other_bytes_is_refused(fake: FakePget) -> None:
    """P2"""
    with fake.path.open("a") as program:
        program.write("# changed\n")
    seen = hashlib.sha256(fake.path.read_bytes()).hexdigest()
    with pytest.raises(BaseModelError) as error:
        find_pget(fake.sha256, str(fake.path))
    assert str(error.value) == (
        f"{fake.path} has the SHA-256 {seen}. Expected {fake.sha256}, to which KLORA_PGET_SHA256 is set."
    )
    assert fake.runs() == []


@pytest.mark.parametrize("sha256", [None, ""])
def test_a_pget_that_nobody_has_pinned_is_not_used_and_the_log_says_so(
    fake: FakePget, caplog: pytest.LogCaptureFixture, sha256: str | None
) -> None:
    caplog.set_level(logging.INFO)
    assert find_pget(sha256, str(fake.path)) is None
    assert caplog.messages == [
        f"{fake.path} is not used, for nothing says which SHA-256 it must have: set KLORA_PGET_SHA256."
    ]
