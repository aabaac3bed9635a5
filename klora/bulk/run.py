"""Batches of jobs -> files in a folder; what happened is told as it happens, and summed up. Knows no model."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from klora.bulk.batch import DrawBatch, Outcome, Outcomes, make
from klora.bulk.batches import Batch, Bulk
from klora.bulk.cluster import spread
from klora.bulk.folder import Folder
from klora.bulk.lines import PromptFile, by_line

Digests = Callable[[Iterable[str]], Mapping[str, Sequence[str]]]
"""References of LoRAs -> {reference: sha256 of each of its files, in hex}, of those that name local files."""


def run(
    prompts: PromptFile,
    bulk: Bulk,
    out: Path,
    opened: Callable[[], DrawBatch],
    tell: Callable[[str], None],
    digests: Digests = lambda references: {},
) -> Outcome:
    """Make the images of a prompt file that are not there yet, and say so, batch by batch. Raises KLoRAError for what
    stops all of them; what has been made stays.

    opened: what makes images, once it is needed; on a cluster each worker calls it, so that it must be a module's.
    digests: where local files may be named, lest images of another file under the same name be taken for these.
    """
    jobs = bulk.jobs(prompts)
    folder = Folder(out, digests({reference for job in jobs for reference in job.request.loras.values()}))
    out.mkdir(parents=True, exist_ok=True)
    if prompts.empty:
        tell(f"Skipped empty lines: {', '.join(map(str, prompts.empty))}.")
    for remark, images in Counter(said for job in jobs for said in job.request.remarks(job.request.roles)).items():
        tell(f"In {images} of {len(jobs)} images {remark}.")
    there = {job.index for job in jobs if folder.done(job)}
    # Batches are those of the first time, and made again as a whole: a batched product rounds otherwise in another.
    batches = [batch for batch in bulk.batches(jobs) if not there.issuperset(job.index for job in batch)]
    total = Outcome(faults=list(prompts.faults))
    try:
        with closing(_outcomes(bulk, batches, folder, opened)) as outcomes:
            _follow(outcomes, total, there, len(jobs), tell, stop=bulk.on_error != "skip")
    except (KeyboardInterrupt, SystemExit):
        tell(f"Interrupted: {sum(map(folder.shows, jobs))} of {len(jobs)} are in {out}. The same command goes on.")
        raise
    _sum_up(total, len(there), len(total.there - there), out, tell)
    return total


def _outcomes(bulk: Bulk, batches: Sequence[Batch], folder: Folder, opened: Callable[[], DrawBatch]) -> Outcomes:
    if batches and (bulk.ray or bulk.ray_workers):
        yield from spread(batches, opened, folder, bulk.ray_workers)
    elif batches:
        draw = opened()
        for batch in batches:
            yield make(batch, draw, folder)


def _follow(
    outcomes: Outcomes, total: Outcome, there: set[int], jobs: int, tell: Callable[[str], None], *, stop: bool
) -> None:
    """Count outcomes in, and tell how far it is. stop: at the first fault."""
    started, before = time.monotonic(), len(total.faults)
    for outcome in outcomes:
        total.add(outcome)
        drawn, failed = len(total.there - there) + len(total.withheld), len(total.faults) - before
        tell(progress(len(there) + drawn + failed, jobs, drawn, time.monotonic() - started))
        if stop and outcome.faults:
            tell("Stopped at a line that failed. The same command goes on; on_error skip passes over it.")
            return


def progress(done: int, jobs: int, fresh: int, seconds: float) -> str:
    """How far it is, how fast, and for how long still. fresh: those of done that were drawn in these seconds."""
    if not fresh:
        return f"{done} of {jobs}"
    rate = fresh / seconds
    minutes, left = divmod(round((jobs - done) / rate), 60)
    hours, minutes = divmod(minutes, 60)
    long = f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"
    return f"{done} of {jobs}, {float(f'{rate:.2g}'):g} images/s, {long} left"


def _sum_up(total: Outcome, there: int, new: int, out: Path, tell: Callable[[str], None]) -> None:
    tell(f"{new} images made in {out}" + (f", {there} were there before." if there else "."))
    if total.withheld:
        tell(f"The safety checker withheld those of lines {', '.join(map(str, sorted(total.withheld)))}.")
    for fault in by_line(total.faults):
        tell(f"Not made: {fault}")
