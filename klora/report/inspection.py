"""What a LoRA file is, and which bases read it; without loading a weight of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klora.errors import LoRAError
from klora.files.container import files_of
from klora.files.report import FileReport
from klora.files.shelf import Shelf
from klora.models import load_shapes, origin_of


@dataclass(frozen=True)
class Inspection:
    """What is known of one file. made_for: the model, as far as the file tells.   report: as the first base reads it
    that can; None where none can.   fits: the bases that read it.   refusals: {base that does not: why}."""

    name: str
    size: int
    sha256: str
    made_for: str
    report: FileReport | None
    fits: tuple[str, ...]
    refusals: Mapping[str, str]

    def __str__(self) -> str:
        """In lines, for people."""
        lines = {"file": f"{self.name}, {self.size:,} bytes", "sha256": self.sha256, "made for": self.made_for}
        if self.report:
            triggers, tags = (", ".join(map(repr, words)) for words in (self.report.triggers, self.report.tags))
            lines |= {"holds": str(self.report), "triggers": triggers or "none are named"}
            lines |= {"tags": f"{tags}: most often in its captions, never added to a prompt"} if tags else {}
        lines |= {"fits": ", ".join(self.fits) or "no installed base"}
        lines |= {f"not {base}": why for base, why in self.refusals.items()}
        return "\n".join(f"{name:9} {line}" for name, line in lines.items())


def inspect(path: Path, bases: Mapping[str, tuple[str, Path]]) -> Inspection:
    """Inspect a file with these bases, {name: (key of FAMILIES, folder)}; those of another family than the file's are
    not tried. Raises LoRAError for what is no LoRA file at all."""
    origin = origin_of(path)
    reports: dict[str, FileReport] = {}
    refusals: dict[str, str] = {}
    for name, (family, folder) in bases.items():
        if origin and origin.family != family:
            continue
        try:
            reports[name] = load_shapes(family, folder).read_lora(path).report
        except LoRAError as error:
            refusals[name] = str(error)
    file, digest = files_of(path)["lora"], Shelf().sha256(path)[0]
    first = next(iter(reports.values()), None)
    name = path.absolute().name  # of the working folder, which is ".", too
    return Inspection(name, file.stat().st_size, digest, str(origin or "unknown"), first, tuple(reports), refusals)
