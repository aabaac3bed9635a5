"""From a prompt file to requests for one image each. Knows no model, and no folder for the images.

A plain file has a prompt on each line. A .jsonl file, or any that has such on half its lines, has an object on each
line: the request's inputs by name, of which the prompt is needed. What a line does not say is the same for all lines.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from klora.errors import RequestError
from klora.form.fields import MAX_SEED
from klora.form.request import Request

MAX_LINE_BYTES = 8192
SHOWN = 10  # faults that are named at most
MAX_SENTENCE = 300  # characters that are shown of what is wrong with a line
ALONE = ("num_outputs", "report", "compare", "sweep")  # inputs that have no meaning where each line is one image
LINE_INPUTS = tuple(item.name for item in fields(Request) if item.name not in (*ALONE, "image", "mask"))


@dataclass(frozen=True)
class Job:
    """One image to be made. index: its place in the order of the file, which is its name; line: of the file, from 1;
    named: whether the line names the seed."""

    index: int
    line: int
    request: Request
    named: bool = False


@dataclass(frozen=True)
class Fault:
    """Why the image of a line is not made. line: from 1."""

    line: int
    sentence: str

    def __str__(self) -> str:
        text = self.sentence
        return f"line {self.line}: {text if len(text) <= MAX_SENTENCE else f'{text[:200]} ... {text[-80:]}'}"


@dataclass(frozen=True)
class PromptFile:
    """requests: by place, line and request, in the order of the file; a place whose line has a fault is left free.
    empty: the numbers of the lines without anything, which have no place.  places: all of them.  seed: of the first
    place, from which that of a line that names none is counted."""

    requests: tuple[Job, ...]
    faults: tuple[Fault, ...]
    empty: tuple[int, ...]
    places: int
    seed: int = 0

    def jobs(self, count: int | None = None) -> list[Job]:
        """One for each line, or so many: the lines come again, in turns, with seeds that their inputs had in no turn
        before, but for one that a line names and another comes to by counting. A larger count changes none of them."""
        count = self.places if count is None else count
        lines = [(job, inputs_of(job.request, "seed")) for job in self.requests]
        had = {(inputs, job.request.seed) for job, inputs in lines}
        counted = {(inputs, job.index) for job, inputs in lines if not job.named}

        def taken(inputs: tuple[Any, ...], seed: int) -> bool:
            place = (seed - self.seed) % (MAX_SEED + 1)  # of the line, in its turn, that is counted to this seed
            return (inputs, seed) in had or (inputs, place % self.places) in counted

        def again(job: Job, inputs: tuple[Any, ...], moved: int) -> Job:
            seed = (job.request.seed + moved) % (MAX_SEED + 1)
            while job.named and taken(inputs, seed):
                seed = (seed + 1) % (MAX_SEED + 1)
            had.add((inputs, seed))
            return replace(job, index=job.index + moved, request=replace(job.request, seed=seed))

        turns = range(0, count, self.places)
        jobs = (again(job, inputs, moved) if moved else job for moved in turns for job, inputs in lines)
        return [job for job in jobs if job.index < count]


def inputs_of(request: Request, *without: str) -> tuple[Any, ...]:
    """A request's inputs, but for these. Pictures, which come once for all lines, by identity."""
    values = (getattr(request, item.name) for item in fields(request) if item.name not in without)
    return tuple(id(value) if isinstance(value, Image.Image) else value for value in values)


def by_line(faults: Iterable[Fault]) -> list[Fault]:
    """In the order of the file."""
    return sorted(faults, key=lambda fault: fault.line)


def named(faults: Sequence[Fault]) -> str:
    """The first of them, a sentence each."""
    sentences = [str(fault) for fault in by_line(faults)[:SHOWN]]
    more = len(faults) - len(sentences)
    return " ".join([*sentences, *([f"{more} more."] if more else [])])


def read_prompts(
    path: Path, common: Mapping[str, Any], *, template: str = "{}", most: int | None = None, called: str = ""
) -> PromptFile:
    """Of a prompt file. Image i, counted from 0 without empty lines, has the seed common["seed"] + i where its line
    names none.

    common: a request's inputs for all lines.  template: the prompt, in which {} is the line's.  most: lines.
    called: what its sender knows it by; "": its name.
    Raises RequestError for a file without a prompt, with too many lines, in another encoding than UTF-8 or of another
    kind, and for what cannot be common.
    """
    called = called or path.name
    _check_common(common, template)
    if most is not None and path.stat().st_size > most * (MAX_LINE_BYTES + len("\r\n")):
        raise RequestError(f"{called} is too large. Expected at most {most} lines of {MAX_LINE_BYTES} bytes.")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RequestError(f"{called} is UTF-16. Expected UTF-8.")
    lines = [(number, line.strip()) for number, line in enumerate(content.splitlines(), 1)]
    filled = [(number, line) for number, line in lines if line]
    if not filled:
        raise RequestError(f"{called} has no prompt. Expected one on each line.")
    if most is not None and len(filled) > most:
        raise RequestError(f"{called} has {len(filled)} lines. Expected at most {most}.")
    read = _reader(path.suffix.lower(), [line for _, line in filled], called)
    jobs, faults = [], []
    for index, (number, line) in enumerate(filled):
        seed = (common.get("seed", 0) + index) % (MAX_SEED + 1)
        try:
            given = {**common, "seed": seed, **(inputs := read(line))}
            if isinstance(given["prompt"], str):
                given["prompt"] = template.replace("{}", given["prompt"])
            request = Request(**given)
            request.check_roles(request.roles)  # as making it would, but now
            jobs.append(Job(index, number, request, "seed" in inputs))
        except RequestError as error:
            faults.append(Fault(number, str(error)))
        except OverflowError:  # a whole number that no float can hold
            faults.append(Fault(number, "It has a number that is too large. Expected an object of inputs."))
    empty = tuple(number for number, line in lines if not line)
    return PromptFile(tuple(jobs), tuple(faults), empty, len(filled), common.get("seed", 0))


def _check_common(common: Mapping[str, Any], template: str) -> None:
    """Raise RequestError for inputs that say nothing of an image in a file of many."""
    for item in fields(Request):
        if item.name in ALONE and common.get(item.name, item.default) != item.default:
            raise RequestError(f"{item.name} is {common[item.name]!r}, but each line is one image. Leave it out.")
    if "{}" not in template:
        raise RequestError(
            f"prompt is {template!r:.80}, with no place for the lines. Expected {{}} in it, or {{}} alone."
        )


def _reader(suffix: str, lines: Sequence[bytes], called: str) -> Callable[[bytes], dict[str, Any]]:
    """What reads the lines of a file. Raises RequestError for a table, whose rows would be drawn as they stand."""
    if suffix == ".jsonl" or 2 * sum(map(_is_object, lines)) >= len(lines):  # not the first alone: it may be a bad one
        return _read_object
    if suffix in (".csv", ".tsv", ".json"):
        raise RequestError(f"{called} is a table or JSON. Expected a prompt on each line of a .txt file, or a .jsonl.")
    return _read_plain


def _is_object(line: bytes) -> bool:
    """Whether it is JSON that names a prompt: an upload may come without the name of its file."""
    try:
        inputs = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(inputs, dict) and "prompt" in inputs


def _read_text(line: bytes) -> dict[str, Any]:
    """{"prompt": the line}. Raises RequestError."""
    if len(line) > MAX_LINE_BYTES:
        raise RequestError(f"It has {len(line)} bytes. Expected at most {MAX_LINE_BYTES}.")
    try:
        return {"prompt": line.decode()}
    except UnicodeDecodeError as error:
        raise RequestError("It is no UTF-8 text. Expected UTF-8.") from error


def _read_plain(line: bytes) -> dict[str, Any]:
    """As _read_text(). An object among lines of text is a mistake, and no prompt."""
    if _is_object(line):
        raise RequestError("It is JSON, but most lines of the file are text. Expected all lines of one kind.")
    return _read_text(line)


def _read_object(line: bytes) -> dict[str, Any]:
    """What a line of JSON names. Raises RequestError."""
    text = _read_text(line)["prompt"]
    try:
        inputs = json.loads(text)
    except RecursionError as error:
        raise RequestError("It is JSON in too many levels. Expected an object of inputs.") from error
    except json.JSONDecodeError as error:
        raise RequestError(f"It is no JSON: {error.msg} at character {error.pos + 1}. Expected an object.") from error
    except ValueError as error:  # a number of thousands of digits
        raise RequestError("It has a number that is too large. Expected an object of inputs.") from error
    if not isinstance(inputs, dict):
        raise RequestError("It is JSON, but no object. Expected an object of inputs, by name.")
    if unknown := [name for name in inputs if name not in LINE_INPUTS]:
        raise RequestError(f"{unknown[0]!r} is no input of a line. Expected {', '.join(LINE_INPUTS)}.")
    if "prompt" not in inputs:
        raise RequestError("It has no prompt. Expected one.")
    return inputs
