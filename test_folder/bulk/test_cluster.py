"""Batches spread over a Ray cluster: a real one of this machine, and one that does what a test needs."""

import errno
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from klora import cli
from klora.bulk.batch import DrawBatch, make
from klora.bulk.batches import Bulk
from klora.bulk.cluster import TRIES, spread
from klora.bulk.folder import Folder
from klora.bulk.lines import PromptFile
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.form.request import Request
from klora.studio import Check
from test_folder.bulk.prompting import PROMPTS, Runs, contents, pictures, read, written


def test_without_ray_it_is_said_how_to_get_it(prompts: PromptFile, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"^Ray is not installed\. Expected it on all nodes: pip install ray$"):
        runs(prompts, ray=True)


@pytest.fixture(scope="module")
def ray(bases: Path) -> Iterator[Any]:
    """A cluster of this machine alone: two workers at a time."""
    # Its sockets' names are too long below a test's own folder.
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as own,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 starves them beside other tests
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        patch.setenv("KLORA_MODELS", str(bases))
        ray = pytest.importorskip("ray")
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=2, _temp_dir=own, **quiet)
        yield ray
        ray.shutdown()


def at_work(folder: Path) -> list[int]:
    """Which of the workers that opened_with_another() opened."""
    return [int(worker.name) for worker in folder.iterdir() if worker.read_text()]


def opened_with_another(folder: Path) -> DrawBatch:
    """The command's, in a worker that says who it is and when it is at work, and begins when there are two."""
    own = folder / str(os.getpid())
    own.touch()
    draw = cli.open_studio()
    while len(list(folder.glob("[0-9]*"))) < 2:
        time.sleep(0.01)

    def draw_(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        own.write_text("at work")
        time.sleep(0.2)  # long enough to be seen, however soon it is done
        images = draw(asked, check)
        own.write_text("")
        return images

    return draw_


def test_a_worker_that_is_killed_at_work_loses_nothing_and_nothing_is_made_twice(shell: Path, ray: Any) -> None:
    given = {"model": "sdxl", "content_lora": "content.safetensors", "style_lora": "style.safetensors"}
    prompts = read(written(shell / "p.txt", *(f"prompt {i}" for i in range(8))), num_inference_steps=4, **given)
    batches = Bulk(batch_size=2).batches(prompts.jobs())
    for folder in ("workers", "out", "whole"):
        (shell / folder).mkdir()

    def kill_one(images: int) -> dict[str, tuple[int, bytes]]:
        """As soon as there are so many, and one is at work; what is there then."""
        end = time.monotonic() + 60
        while len(pictures(shell / "out")) < images or not (working := at_work(shell / "workers")):
            assert time.monotonic() < end, "none was seen at work"
            time.sleep(0.01)
        os.kill(working[0], signal.SIGKILL)
        return contents(shell / "out")

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_one, 2)
        draws = partial(opened_with_another, shell / "workers")
        ended = list(spread(batches, draws, Folder(Path("out")), workers=2))
        before = killing.result()
    assert [sorted(place for outcome in ended for place in outcome.there), ended[0].faults] == [list(range(8)), []]
    after = contents(shell / "out")
    assert {name: after[name] for name in before if name.endswith(".json")} == {
        name: content for name, content in before.items() if name.endswith(".json")
    }
    draw = cli.open_studio()
    for batch in batches:
        make(batch, draw, Folder(shell / "whole"))
    assert len(pictures(shell / "out")) == 8
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in contents(shell / "whole").items()
    }


class DiedError(Exception):
    """A worker's process is gone."""


class FailedError(Exception):
    """What a worker raised, as Ray hands it over."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@dataclass
class Cluster:
    """As much of Ray as is used: calls are made when their results are asked for, the first one first."""

    gpus: int = 0
    hired: list[dict[str, Any]] = field(default_factory=list)
    gone: int = 0
    running: bool = True
    failing: Exception | None = None  # of init
    exceptions = SimpleNamespace(RayActorError=DiedError, RayTaskError=FailedError)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}, {"Alive": False}, {"Alive": True}]

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.failing:
            raise self.failing
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def remote(self, **options: Any) -> Callable[[type], Any]:
        def later(call: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: partial(call, *arguments))

        def hire(kind: type, *arguments: Any) -> Any:
            self.hired.append(options)
            worker = kind(*arguments)
            return SimpleNamespace(start=later(worker.start), make=later(worker.make))

        return lambda kind: SimpleNamespace(remote=partial(hire, kind))

    def wait(self, calls: list[Any]) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Any) -> Any:
        try:
            return call()
        except (KLoRAError, OSError) as error:
            raise FailedError(error) from error

    def kill(self, worker: Any) -> None:
        self.gone += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "ray", cluster)
    return cluster


def deadly(draw: DrawBatch, prompt: str, times: int) -> DrawBatch:
    """Kills its worker at a prompt, so many times."""
    left = [times]

    def draw_(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        if left[0] and prompt in {request.prompt for request in asked}:
            left[0] -= 1
            raise DiedError
        return draw(asked, check)

    return draw_


def test_a_batch_whose_workers_die_is_given_up_after_some_tries_and_the_rest_is_made(
    cluster: Cluster, runs: Runs, draw: DrawBatch, prompts: PromptFile, tmp_path: Path
) -> None:
    said = runs(prompts, drawing=deadly(draw, PROMPTS[2], TRIES), ray=True, on_error="skip")
    sentence = f"Its worker died, {TRIES} times. Expected more memory, or a smaller batch_size."
    assert said[-2:] == [f"Not made: line {line}: {sentence}" for line in (3, 4)]
    assert sorted(pictures(tmp_path / "out")) == ["00000.png", "00001.png", "00004.png"]
    assert len(cluster.hired) == 2 + TRIES and cluster.gone == 2
    assert runs(prompts, drawing=deadly(draw, PROMPTS[2], TRIES - 1), ray=True)[-1].startswith("2 images made")


def test_a_workers_full_disk_is_what_the_command_hears_of(cluster: Cluster, runs: Runs, prompts: PromptFile) -> None:
    def full(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as failed:
        runs(prompts, drawing=full, ray=True)
    assert failed.value.errno == errno.ENOSPC


def test_each_gpu_has_a_worker_or_else_each_node_and_never_more_than_batches(
    cluster: Cluster, runs: Runs, prompts: PromptFile, tmp_path: Path
) -> None:
    def hired(out: str, **given: Any) -> list[dict[str, Any]]:
        cluster.hired.clear()
        runs(prompts, tmp_path / out, **{"ray": True, "batch_size": 1, "count": 4} | given)
        return cluster.hired

    on_cpu = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    assert hired("nodes") == [on_cpu] * 2
    assert hired("asked for", ray_workers=3) == [on_cpu] * 3
    assert hired("asked for alone", ray=False, ray_workers=3) == [on_cpu] * 3
    cluster.gpus = 3
    assert hired("gpus") == [{"num_gpus": 1}] * 3
    cluster.gpus = 16
    assert hired("more than batches") == [{"num_gpus": 1}] * 4


def test_a_cluster_that_was_begun_here_ends_here_and_one_that_is_lacking_is_told(
    cluster: Cluster, prompts: PromptFile, tmp_path: Path
) -> None:
    batches, handler = Bulk().batches(prompts.jobs()), signal.getsignal(signal.SIGTERM)
    for running in (True, False):
        cluster.running = running
        list(spread(batches, lambda: lambda asked, check: {}, Folder(tmp_path), None))
        assert (cluster.running, signal.getsignal(signal.SIGTERM)) == (running, handler)
    for cluster.failing in (ConnectionError("Could not find any running Ray instance."), ValueError("Invalid address")):
        with pytest.raises(RequestError, match=r"^RAY_ADDRESS leads to no Ray cluster\. Expected that of one, or "):
            list(spread(batches, lambda: lambda asked, check: {}, Folder(tmp_path), None))
        assert signal.getsignal(signal.SIGTERM) == handler


def test_workers_that_die_as_they_start_now_and_then_stop_nothing(
    cluster: Cluster, prompts: PromptFile, tmp_path: Path
) -> None:
    """As where machines are taken back: only so many in a row say that none can start."""
    starts = iter([*[DiedError] * (TRIES - 1), None] * 2)

    def opened() -> DrawBatch:
        if died := next(starts):
            raise died
        return deadly(lambda asked, check: {}, PROMPTS[0], 1 if len(cluster.hired) == TRIES else 0)

    batches = Bulk(batch_size=8).batches(prompts.jobs())
    assert len(list(spread(batches, opened, Folder(tmp_path), None))) == len(batches) == 1
    assert len(cluster.hired) == 2 * TRIES


def test_nobody_waits_for_a_worker_once_all_is_made(cluster: Cluster, prompts: PromptFile, tmp_path: Path) -> None:
    starts = iter([None, *[DiedError] * TRIES])

    def opened() -> DrawBatch:
        if died := next(starts):
            raise died
        return lambda asked, check: {}

    batches = Bulk(batch_size=3).batches(prompts.jobs())
    assert len(list(spread(batches, opened, Folder(tmp_path), None))) == len(batches) == 2
    assert len(cluster.hired) == cluster.gone + TRIES - 1 == TRIES + 1


def test_workers_that_cannot_start_stop_all_and_say_why(cluster: Cluster, prompts: PromptFile, tmp_path: Path) -> None:
    def dying() -> DrawBatch:
        raise DiedError

    def refusing() -> DrawBatch:
        raise LoRAError("style_lora is no LoRA.")

    batches = Bulk().batches(prompts.jobs())
    with pytest.raises(RequestError, match=rf"^Ray's workers die as they start, {TRIES} times: see Ray's logs\.$"):
        list(spread(batches, dying, Folder(tmp_path), None))
    with pytest.raises(LoRAError, match=r"^style_lora is no LoRA\.$"):
        list(spread(batches, refusing, Folder(tmp_path), None))
    with pytest.raises(
        RequestError, match=r"/none is not on every node of the cluster\. Expected a folder that all share\."
    ):
        list(spread(batches, dying, Folder(tmp_path / "none"), None))
