"""A training that is resumed: what its tar holds, and what may be changed. Knows neither the base nor the pictures."""

import dataclasses
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from klora.errors import RequestError
from klora.training.config import TrainConfig, stripped
from klora.training.run import saved_step
from klora.training.writing import RESUME_STATE, writing

LOG, FACTS = "train.jsonl", "config.json"
# The settings that may be changed when a training is resumed; all others keep their values.
CHANGEABLE = {"steps", "sample_prompts", "sample_interval", "sample_steps", "checkpoint_interval", "keep_checkpoints",
              "precision", "gradient_checkpointing", "compile"}  # fmt: skip
_NEEDED = (RESUME_STATE, FACTS, LOG)
_OUTPUTS = re.compile(r"samples/step_\d{6}_\d+\.png|checkpoints/lora_\d{6}\.safetensors")
_DEFAULTS: Mapping[str, Any] = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
_BLANK = (None, "")
# {a field that may be blank: the fact of config.json that has the value that was used then}
_RESOLVED = {"trigger_word": "trigger", "instance_prompt": "prompt", "lora_rank": "rank", "lora_alpha": "rank"}
_EXPECTED = "Expected the tar of a training"


@dataclasses.dataclass(frozen=True)
class TakenUp:
    """A training read from its tar. folder: where that was unpacked; settings: those it was trained with; facts: its
    config.json; step: the steps done."""

    folder: Path
    settings: TrainConfig
    facts: Mapping[str, Any]
    step: int

    @property
    def state(self) -> Path:
        """The file of the run's state, for Run.load()."""
        return self.folder / RESUME_STATE

    def config(self, form: Mapping[str, Any]) -> TrainConfig:
        """The training's settings, with those of the form where they may be changed. Raises RequestError for others.

        A form sends every field, so that one at its default counts as unchanged, except that steps at its default
        counts as given when the training had done all its steps.
        """
        changed = {name: value for name, value in stripped(form).items() if value != _DEFAULTS[name]}
        if self.settings.steps <= self.step < _DEFAULTS["steps"]:
            changed.setdefault("steps", _DEFAULTS["steps"])
        for name, value in changed.items():
            if name not in CHANGEABLE and value != (before := self._setting(name)):
                seen = "it blank" if before in _BLANK else repr(before)
                raise RequestError(f"{name} is {value!r}, but resume_from was trained with {seen}. Expected that.")
        changes = {name: value for name, value in changed.items() if name in CHANGEABLE}
        return dataclasses.replace(self.settings, **changes)

    def _setting(self, name: str) -> Any:
        """The value of a field; where it was blank, the value that was used then."""
        value = getattr(self.settings, name)
        return self.facts.get(_RESOLVED.get(name, ""), value) if value in _BLANK else value

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise RequestError unless the facts of the continued training name the same base and the same pictures."""
        if (base := facts["base"]) != (before := self.facts["base"]):
            raise RequestError(f"base_model is {base!r}, but resume_from was trained on {before!r}. Expected that.")
        if facts["dataset"] != self.facts["dataset"]:
            seen, before = facts["pictures"], self.facts["pictures"]
            raise RequestError(
                f"input_images (pictures: {seen}) is not what resume_from was trained on (pictures: {before}). "
                "Expected the same pictures with the same captions."
            )

    def carry(self, config: TrainConfig, results: Path) -> None:
        """Move into the results the log up to the step, the checkpoints and, if config has the same sample prompts, the
        samples. Raises RequestError."""
        samples = ("samples",) if self.settings.samples == config.samples else ()
        with writing():
            (results / LOG).write_text("".join(_lines(self.folder / LOG, self.step)))
            for name in ("checkpoints", *samples):
                if (self.folder / name).is_dir():
                    (self.folder / name).rename(results / name)


def taken_up(tar: Path, folder: Path) -> TakenUp:
    """Unpack a training's tar into a folder, all but its LoRA, and read its settings. Raises RequestError."""
    _unpack(tar, folder)
    if lacking := [name for name in sorted(_NEEDED) if not (folder / name).is_file()]:
        raise RequestError(f"resume_from holds no {lacking[0]}. {_EXPECTED}.")
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"resume_from holds a {FACTS} that cannot be read. {_EXPECTED}.") from error
    if lacking := sorted(
        {*_DEFAULTS, "base", "dataset", "pictures"}.difference(facts if isinstance(facts, dict) else ())
    ):
        raise RequestError(f"resume_from holds a {FACTS} without {lacking[0]}. {_EXPECTED} by this version.")
    settings = TrainConfig(**{name: facts[name] for name in _DEFAULTS})
    return TakenUp(folder, settings, facts, saved_step(folder / RESUME_STATE))


def _unpack(tar: Path, folder: Path) -> None:
    # Uncompressed and without holes, as ours are: so it unpacks to no more bytes than it has, which are many GB for a
    # large rank, and an extended header, which tarfile reads into memory, is no longer than the tar.
    # As a stream, which never goes back: members of negative sizes would follow one another for ever (CVE-2025-8194).
    try:
        with tarfile.open(tar, "r|", bufsize=1 << 20) as archive:
            for member in archive:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} has holes")  # and may be terabytes of them
                name = member.name.removeprefix("./")  # as `tar -cf made.tar -C folder .` has it
                if member.isfile() and (name in _NEEDED or _OUTPUTS.fullmatch(name)):
                    _write(cast(IO[bytes], archive.extractfile(member)), folder / name)
    except RequestError:
        raise
    except (tarfile.TarError, ValueError, RecursionError, OSError) as error:  # the two in the middle: extended headers
        raise RequestError(f"resume_from cannot be read as a plain tar. {_EXPECTED}, not compressed.") from error


def _write(source: IO[bytes], path: Path) -> None:
    """Copy a member to a path. An error of writing is raised as RequestError, one of reading as it is."""
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
    for chunk in iter(partial(source.read, 1 << 20), b""):
        with writing(), path.open("ab") as file:
            file.write(chunk)


def _lines(log: Path, step: int) -> Iterator[str]:
    """The lines of a log up to a step: after its run was saved, the training may have logged more."""
    try:
        for line in log.read_text().splitlines(keepends=True):
            if json.loads(line)["step"] <= step:
                yield line
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"resume_from holds a {LOG} that cannot be read. {_EXPECTED}.") from error
