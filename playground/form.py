"""A server's form as data: what its OpenAPI document says of each input. Knows no input by name."""

import base64
import math
import mimetypes
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

from playground.errors import PlaygroundError

COARSEST = Decimal("0.05")  # of a slider's steps, where its bounds and its beginning need no finer one
_BLANK_MEANS = re.compile(r"Blank means (-?\d+(?:\.\d+)?)\.(?= |$)")


class Kind(StrEnum):
    """What an input takes."""

    TEXT, SECRET, FILE = "text", "secret", "file"
    CHOICE, SWITCH, INTEGER, NUMBER = "choice", "switch", "integer", "number"


@dataclass(frozen=True)
class Field:
    """One input. default: None where it may be left out, or must be given.  blank: the number that its description says
    a blank means."""

    name: str
    kind: Kind
    description: str
    default: Any
    required: bool
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    accept: str | None = None

    @property
    def blank(self) -> float | None:
        """The number that a blank stands for, where the description says so."""
        means = _BLANK_MEANS.search(self.description)
        return float(means[1]) if means and self.default is None else None

    @property
    def step(self) -> float:
        """Of a slider: so fine that its bounds, and where it begins, are places on it."""
        if self.kind is Kind.INTEGER:
            return 1
        start = self.blank if self.default is None else self.default
        ends = [Decimal(str(end)).normalize() for end in (self.minimum, self.maximum, start) if end is not None]
        return float(min(COARSEST, *(Decimal(1).scaleb(int(end.as_tuple().exponent)) for end in ends)))


def read_form(schemas: Mapping[str, Any], component: str) -> list[Field]:
    """The inputs in their order, without the deprecated ones. schemas: of an OpenAPI document of Cog.

    Raises PlaygroundError where the document is of something else.
    """
    if component not in schemas:
        raise PlaygroundError(f"The server's OpenAPI document has no {component}. Expected a server of K-LoRA.")
    form = schemas[component]
    ordered = sorted(form["properties"].items(), key=lambda item: item[1].get("x-order", 999))
    required = form.get("required", [])
    return [_field(name, said, schemas, name in required) for name, said in ordered if not said.get("deprecated")]


def inputs_of(fields: Iterable[Field], values: Iterable[Any]) -> dict[str, Any]:
    """What to send: what was filled in, uploads as data URIs. values: of the fields, None or "" where blank.

    Raises PlaygroundError.
    """
    given = {}
    for field, value in zip(fields, values, strict=True):
        if value is None or value == "" or (field.blank is not None and value == field.blank):
            continue
        given[field.name] = _sent(field, value)
    return given


def data_uri(path: Path) -> str:
    """A file as it stands in a request."""
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _sent(field: Field, value: Any) -> Any:
    """In JSON's type: a page gives numbers as text, and whole ones where they are."""
    if field.kind is Kind.FILE:
        return data_uri(Path(value))
    if field.kind not in (Kind.INTEGER, Kind.NUMBER):
        return value
    kind, wanted = (int, "a whole number") if field.kind is Kind.INTEGER else (float, "a finite number")
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not -math.inf < number < math.inf:  # which JSON cannot say
        raise PlaygroundError(f"{field.name} is {value!r}. Expected {wanted}.")
    return number


def _field(name: str, said: Mapping[str, Any], schemas: Mapping[str, Any], required: bool) -> Field:
    [target] = said.get("allOf", [{"$ref": ""}])
    choices = tuple(schemas[target["$ref"].rpartition("/")[2]]["enum"]) if target["$ref"] else ()
    return Field(
        name, Kind.CHOICE if choices else _kind(said), said.get("description", ""), said.get("default"), required,
        choices, said.get("minimum"), said.get("maximum"), said.get("x-cog-accept"),
    )  # fmt: skip


def _kind(said: Mapping[str, Any]) -> Kind:
    by_format = {"uri": Kind.FILE, "password": Kind.SECRET}
    by_type = {"integer": Kind.INTEGER, "number": Kind.NUMBER, "boolean": Kind.SWITCH}
    return by_format.get(said.get("format", "")) or by_type.get(said.get("type", ""), Kind.TEXT)
