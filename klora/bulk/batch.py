"""One batch: its images made, checked and written. This is all that a worker does. Knows no model."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from klora.bulk.batches import Batch
from klora.bulk.folder import Folder
from klora.bulk.lines import Fault
from klora.errors import KLoRAError, RequestError
from klora.form.request import Request
from klora.interruptible import in_threads
from klora.studio.provenance import Check

DrawBatch = Callable[[Sequence[Request], Check], Mapping[int, Image.Image]]
"""Requests for one image each that agree in all but prompt and seed -> {place: image}, without the images that the
safety checker withholds. Each has its provenance and its caption in its info. Calls Check with the LoRAs before
anything is drawn. Raises KLoRAError, also what Check raises."""


@dataclass
class Outcome:
    """What has become of jobs. there: places of the images that are there now, whoever made them; withheld: lines whose
    images the safety checker withholds."""

    there: set[int] = field(default_factory=set)
    withheld: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        """Count another one in."""
        self.there |= other.there
        self.withheld += other.withheld
        self.faults += other.faults


Outcomes = Generator[Outcome, None, None]


def make(batch: Batch, draw: DrawBatch, folder: Folder) -> Outcome:
    """Make a batch, and write what of it is not there yet. What the user can put right is a fault of its lines."""
    lacking = {place: job for place, job in enumerate(batch) if not folder.done(job)}
    outcome = Outcome()
    try:
        images = draw([job.request for job in batch], partial(folder.check, batch[0])) if lacking else {}
    except KLoRAError as error:
        if isinstance(error, RequestError) and len(batch) > 1:  # one prompt's, perhaps: the others are as good as ever
            for job in batch:
                outcome.add(make([job], draw, folder))
            return outcome
        outcome.faults = [Fault(job.line, str(error)) for job in lacking.values()]
    else:
        shown = {place: job for place, job in lacking.items() if place in images}
        in_threads(lambda place: folder.keep(shown[place], images[place]), shown)
        for job in (job for place, job in lacking.items() if place not in shown):
            folder.withhold(job)
            outcome.withheld.append(job.line)
    outcome.there = {job.index for job in batch if folder.shows(job)}
    return outcome
