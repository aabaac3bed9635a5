"""Which images are made, in which order, and which of them together. Knows no model, and nothing of what is done."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from klora.bulk.lines import Fault, Job, PromptFile, inputs_of, named
from klora.errors import RequestError
from klora.form.fields import MAX_SEED, ask, check

Batch = Sequence[Job]


@dataclass(frozen=True)
class Bulk:
    """How a prompt file is worked through, checked on creation. Raises RequestError."""

    batch_size: int = ask(4, "Images that are made together: as many as fit in memory.", ge=1, le=64)
    count: int | None = ask(
        None, "Number of images; beyond the lines, they repeat with new seeds. Default: one per line.", ge=1, le=10**8
    )
    shuffle: int | None = ask(None, "Make the images in a random order, drawn from this seed.", ge=0, le=MAX_SEED)
    shard: str = ask("1/1", "Make only the i-th of n parts, written i/n; all parts may share the folder.")
    on_error: str | None = ask(
        None, "What to do at a bad line or a failure. Default: stop, but skip empty lines.", choices=("stop", "skip")
    )
    ray: bool = ask(False, "Spread the work over a Ray cluster, one worker per GPU.")
    ray_workers: int | None = ask(None, "Number of Ray workers; implies --ray. Default: one per GPU.", ge=1, le=10_000)

    def __post_init__(self) -> None:
        check(self)
        part = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard)
        if not part or not 1 <= int(part[1]) <= int(part[2]):
            raise RequestError(f"shard is {self.shard!r}. Expected i/n, with i from 1 to n.")

    def jobs(self, prompts: PromptFile) -> list[Job]:
        """This part's images, in the order in which they are made. Raises RequestError for lines that stop it."""
        bad = [*prompts.faults, *(Fault(line, "It is empty. Expected a prompt.") for line in prompts.empty)]
        stopping = bad if self.on_error == "stop" else prompts.faults if self.on_error is None else ()
        if stopping:
            raise RequestError(f"Some lines cannot be used: {named(stopping)} Mend them, or skip them by on_error.")
        jobs = prompts.jobs(self.count)
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(jobs)
        i, n = map(int, self.shard.split("/"))
        return [job for job in jobs if job.index % n == i - 1]

    def batches(self, jobs: Iterable[Job]) -> list[Batch]:
        """Of those that agree in all but prompt and seed, so that they share LoRAs and steps; such groups follow one
        another in the order of their first images."""
        groups: dict[tuple[Any, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault(inputs_of(job.request, "prompt", "seed"), []).append(job)
        size = self.batch_size
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
