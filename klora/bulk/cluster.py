"""Batches spread over a Ray cluster: each worker takes one at a time, and a batch whose worker dies goes to another.

Nodes share the folder of the images, and have the bases and the user's tokens by their own environment: nothing secret
is handed over. Ray is imported when it is asked for.
"""

import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from klora.bulk.batch import DrawBatch, Outcome, Outcomes, make
from klora.bulk.batches import Batch
from klora.bulk.folder import Folder
from klora.bulk.lines import Fault
from klora.errors import KLoRAError, RequestError

TRIES = 3  # of a batch whose workers die, and of starting a worker


def spread(batches: Sequence[Batch], opened: Callable[[], DrawBatch], folder: Folder, workers: int | None) -> Outcomes:
    """The outcome of each batch, as they end. workers: None is one for each GPU, else for each node of the cluster.

    The cluster is the one that this process, or RAY_ADDRESS, is connected to, else one of this machine alone, for the
    time being. Raises RequestError without Ray or that cluster, and where workers cannot start; KLoRAError as opened
    does.
    """
    ray = _imported()
    started_here = not ray.is_initialized()
    if started_here:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, ValueError) as error:
            raise RequestError("RAY_ADDRESS leads to no Ray cluster. Expected that of one, or none.") from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # which Ray has replaced by one with another status
    crew = _Crew(ray, opened, replace(folder, path=folder.path.resolve()))
    try:
        yield from crew.work(batches, workers)
    finally:
        crew.leave()
        if started_here:
            ray.shutdown()


def _imported() -> Any:  # Any: an optional library
    try:
        import ray
    except ImportError as error:
        raise RequestError("Ray is not installed. Expected it on all nodes: pip install ray") from error
    return ray


class _Worker:
    """What runs on a node, in a process of its own."""

    def __init__(self, opened: Callable[[], DrawBatch], folder: Folder, here: Path) -> None:
        self._opened, self._folder, self._here = opened, folder, here
        self._draw: DrawBatch | None = None

    def start(self) -> None:
        """Raises RequestError where this node does not share the folders, and KLoRAError."""
        for path in (self._here, self._folder.path):
            if not path.is_dir():
                raise RequestError(f"{path} is not on every node of the cluster. Expected a folder that all share.")
        os.chdir(self._here)  # local LoRA files are named from there
        self._draw = self._opened()

    def make(self, batch: Batch) -> Outcome:
        """Its files are written here."""
        assert self._draw is not None, "start() comes first"
        return make(batch, self._draw, self._folder)


class _Crew:
    """The workers, what each of them does, and what is still to be done."""

    def __init__(self, ray: Any, opened: Callable[[], DrawBatch], folder: Folder) -> None:
        self._ray, self._arguments = ray, (opened, folder, Path.cwd())
        self._busy: dict[Any, tuple[Any, Batch | None]] = {}  # by Ray's reference: a worker, None while it starts
        self._idle: list[Any] = []
        self._deaths: Counter[int] = Counter()  # by a batch's first image; -1 of those in a row that were starting

    def work(self, batches: Sequence[Batch], workers: int | None) -> Outcomes:
        """Have all batches made."""
        waiting = deque(batches)
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        for _ in range(min(workers or gpus or sum(node["Alive"] for node in self._ray.nodes()), len(batches))):
            self._hire(gpus)
        while waiting or any(batch for _, batch in self._busy.values()):
            while waiting and self._idle:
                idle, given = self._idle.pop(), waiting.popleft()
                self._busy[idle.make.remote(given)] = idle, given
            (ended,), _ = self._ray.wait(list(self._busy))
            worker, batch = self._busy.pop(ended)
            try:
                outcome = self._ray.get(ended)
            except self._ray.exceptions.RayActorError as error:
                yield from self._bury(batch, waiting, error)
                self._hire(gpus)
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, KLoRAError | OSError) else error from None
            self._idle.append(worker)
            if batch:
                yield outcome
            else:
                del self._deaths[-1]  # what made workers die as they started is over

    def leave(self) -> None:
        """End all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    def _hire(self, gpus: int) -> None:
        options = {"num_gpus": 1} if gpus else {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        worker = self._ray.remote(**options)(_Worker).remote(*self._arguments)
        self._busy[worker.start.remote()] = worker, None

    def _bury(self, batch: Batch | None, waiting: "deque[Batch]", error: BaseException) -> Outcomes:
        """Give the batch of a worker that has died back, or up. Raises RequestError where workers die as they start."""
        key = batch[0].index if batch else -1
        self._deaths[key] += 1
        if self._deaths[key] < TRIES:
            waiting.extendleft([batch] if batch else [])
        elif batch:
            sentence = f"Its worker died, {TRIES} times. Expected more memory, or a smaller batch_size."
            yield Outcome(faults=[Fault(job.line, sentence) for job in batch])
        else:
            raise RequestError(f"Ray's workers die as they start, {TRIES} times: see Ray's logs.") from error
