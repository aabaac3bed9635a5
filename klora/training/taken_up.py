"""A training that goes on from the tar that one has left. Knows neither the base nor the pictures."""

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
# What a run that is taken up again may be told anew; all else is as it was.
FREE = {"steps", "sample_prompts", "sample_interval", "sample_steps", "checkpoint_interval", "keep_checkpoints",
        "precision", "gradient_checkpointing", "compile"}  # fmt: skip
_NEEDED = (RESUME_STATE, FACTS, LOG)
_MADE = re.compile(r"samples/step_\d{6}_\d+\.png|checkpoints/lora_\d{6}\.safetensors")
_DEFAULTS: Mapping[str, Any] = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
_BLANK = (None, "")
# What fields that were left so came to, by their names in config.json.
_CAME_TO = {"trigger_word": "trigger", "instance_prompt": "prompt", "lora_rank": "rank", "lora_alpha": "rank"}
_OURS = "Expected the tar of a training"


@dataclasses.dataclass(frozen=True)
class TakenUp:
    """What a tar holds of a training. folder: where it was unpacked; was: its settings; facts: its config.json;
    step: how far it came."""

    folder: Path
    was: TrainConfig
    facts: Mapping[str, Any]
    step: int

    @property
    def state(self) -> Path:
        """The file that the run goes on from."""
        return self.folder / RESUME_STATE

    def config(self, given: Mapping[str, Any]) -> TrainConfig:
        """The training's own settings, and what it may be told anew. Raises RequestError for what it may not.

        A form sends every field, so that one at its default is taken as not given; but the default of steps is meant
        where the training had come to its end.
        """
        asked = {name: value for name, value in stripped(given).items() if value != _DEFAULTS[name]}
        if self.was.steps <= self.step < _DEFAULTS["steps"]:
            asked.setdefault("steps", _DEFAULTS["steps"])
        for name, value in asked.items():
            if name not in FREE and value != (before := self._setting(name)):
                was = "it blank" if before in _BLANK else repr(before)
                raise RequestError(f"{name} is {value!r}, but resume_from was trained with {was}. Expected that.")
        return dataclasses.replace(self.was, **{name: value for name, value in asked.items() if name in FREE})

    def _setting(self, name: str) -> Any:
        """A field as it was, or what it came to where it was blank."""
        before = getattr(self.was, name)
        return self.facts.get(_CAME_TO.get(name, ""), before) if before in _BLANK else before

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse another base and other pictures. Raises RequestError."""
        if (base := facts["base"]) != (before := self.facts["base"]):
            raise RequestError(f"base_model is {base!r}, but resume_from was trained on {before!r}. Expected that.")
        if facts["dataset"] != self.facts["dataset"]:
            seen, before = facts["pictures"], self.facts["pictures"]
            raise RequestError(
                f"input_images (pictures: {seen}) is not what resume_from was trained on (pictures: {before}). "
                "Expected the same pictures with the same captions."
            )

    def carry(self, config: TrainConfig, results: Path) -> None:
        """Move into the results what was made on the way: the log up to the step, checkpoints, and samples unless
        their prompts are others now. Raises RequestError."""
        same = ("samples",) if self.was.samples == config.samples else ()
        with writing():
            (results / LOG).write_text("".join(_lines(self.folder / LOG, self.step)))
            for name in ("checkpoints", *same):
                if (self.folder / name).is_dir():
                    (self.folder / name).rename(results / name)


def taken_up(tar: Path, folder: Path) -> TakenUp:
    """Unpack a training's tar into a folder, all but its LoRA. Raises RequestError."""
    _unpack(tar, folder)
    if lacking := [name for name in sorted(_NEEDED) if not (folder / name).is_file()]:
        raise RequestError(f"resume_from holds no {lacking[0]}. {_OURS}.")
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"resume_from holds a {FACTS} that cannot be read. {_OURS}.") from error
    if lacking := sorted(
        {*_DEFAULTS, "base", "dataset", "pictures"}.difference(facts if isinstance(facts, dict) else ())
    ):
        raise RequestError(f"resume_from holds a {FACTS} without {lacking[0]}. {_OURS} by this version.")
    was = TrainConfig(**{name: facts[name] for name in _DEFAULTS})
    return TakenUp(folder, was, facts, saved_step(folder / RESUME_STATE))


def _unpack(tar: Path, folder: Path) -> None:
    # Plain, as ours are, and without holes: so nothing unpacks to more than the tar takes, which for a large rank is
    # many GB, and an extended header, which tarfile reads into memory, is no longer than that.
    # As a stream, which never goes back: members of negative sizes would follow one another for ever (CVE-2025-8194).
    try:
        with tarfile.open(tar, "r|", bufsize=1 << 20) as archive:
            for member in archive:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} has holes")  # and may be terabytes of them
                name = member.name.removeprefix("./")  # as `tar -cf made.tar -C folder .` has it
                if member.isfile() and (name in _NEEDED or _MADE.fullmatch(name)):
                    _write(cast(IO[bytes], archive.extractfile(member)), folder / name)
    except RequestError:
        raise
    except (tarfile.TarError, ValueError, RecursionError, OSError) as error:  # the two of extended headers
        raise RequestError(f"resume_from cannot be read as a plain tar. {_OURS}, not compressed.") from error


def _write(source: IO[bytes], path: Path) -> None:
    """Reading and writing fail for different reasons, and are told apart."""
    with writing():
        path.parent.mkdir(parents=True, exist_ok=True)
    for chunk in iter(partial(source.read, 1 << 20), b""):
        with writing(), path.open("ab") as file:
            file.write(chunk)


def _lines(log: Path, step: int) -> Iterator[str]:
    """Those of a log up to a step: it may have gone on after the last saving."""
    try:
        for line in log.read_text().splitlines(keepends=True):
            if json.loads(line)["step"] <= step:
                yield line
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"resume_from holds a {LOG} that cannot be read. {_OURS}.") from error
