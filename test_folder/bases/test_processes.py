"""Several processes fetch one base, and processes end in the middle: nothing is fetched twice, nothing is left half."""

import logging
import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import huggingface_hub.constants
import pytest

from klora.bases.install import ensure_base
from klora.bases.pget import Pget
from klora.errors import BaseModelError
from test_folder.fakes.base_hub import BASE, CONFIG, FILES, INDEX, UNET, VAE, Server, contents, leftovers
from test_folder.fakes.pget import FakePget, is_running
from test_folder.waiting import soon

FORK = get_context("fork")  # others would import all that the tests of this process have imported


def ensure_with_small_files(limit: int, folder: Path, endpoint: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ensure_base("tiny", BASE, folder, endpoint=endpoint)


def test_a_disk_that_takes_no_more_is_a_sentence(server: Server, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=FORK) as pool, pytest.raises(BaseModelError) as error:
        pool.submit(ensure_with_small_files, 100_000, tmp_path, server.address).result()
    assert str(error.value) == (
        f"tiny cannot be written into {tmp_path / 'tiny'}: File too large. Expected a disk with room for its files."
    )
    assert leftovers(tmp_path) == []


def test_two_at_once_fetch_each_file_once(server: Server, tmp_path: Path) -> None:
    """P5: the set-up of two containers that share a folder."""
    server.hub.pace = 0.02
    with ProcessPoolExecutor(2, mp_context=FORK) as pool:
        waiting = [pool.submit(ensure_base, "tiny", BASE, tmp_path, endpoint=server.address) for _ in range(2)]
        assert [done.result() for done in waiting] == [tmp_path / "tiny"] * 2
    assert server.hub.fetched().count(UNET) == server.hub.fetched().count(INDEX) == 1
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


def test_who_has_waited_for_another_has_nothing_to_do(
    server: Server, ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    server.hub.pace = 0.01
    caplog.set_level(logging.INFO, "klora.bases")
    with ThreadPoolExecutor(3) as pool:
        assert len({done.result() for done in [pool.submit(ensure) for _ in range(3)]}) == 1
    assert sum("files to fetch" in line for line in caplog.messages) == 1


def begun(folder: Path, server: Server, pget: Pget | None = None) -> BaseProcess:
    """ensure_base in a process of its own."""
    process = FORK.Process(
        target=ensure_base, args=("tiny", BASE, folder, None, pget), kwargs={"endpoint": server.address}
    )
    process.start()
    return process


def test_a_process_killed_half_way_leaves_what_the_next_one_goes_on_from(
    server: Server, ensure: Callable[..., Path], tmp_path: Path
) -> None:
    server.hub.held = {UNET}
    process = begun(tmp_path, server)
    came = [tmp_path / "tiny" / path for path in (VAE, CONFIG)]
    assert soon(lambda: all(path.exists() for path in came) and leftovers(tmp_path))
    process.kill()
    process.join()
    assert not (tmp_path / "tiny" / INDEX).exists()
    server.hub.held, server.hub.asked = set(), []
    ensure()
    assert set(server.hub.fetched()) == {UNET, INDEX}
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


@pytest.mark.parametrize("by", ["huggingface_hub", "pget"])
def test_an_interruption_ends_what_is_under_way(
    server: Server, fake: FakePget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # our files are small
    pget = Pget(fake.path) if by == "pget" else None
    server.hub.pace = 0.0 if pget else 1.0  # half a minute for the largest file
    fake.behave("hang")
    process = begun(tmp_path, server, pget)
    assert soon(lambda: len(fake.runs()) == 2 if pget else UNET in server.hub.fetched())
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1
    assert soon(lambda: not any(is_running(pid) for run in fake.runs() for pid in run["pids"]))
    assert leftovers(tmp_path) == []
    assert not pget or not {UNET, VAE} & set(server.hub.fetched("HEAD resolve"))  # the client does not begin anew
