"""Dataclass fields that say what they accept: the one place where a form's values are checked. Knows no form."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from klora.errors import RequestError

MAX_SEED = (1 << 32) - 1
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # which JSON can spell, and no tokenizer read
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def ask(default: Any, help: str, **bounds: Any) -> Any:  # Any, as dataclasses.field itself is typed
    """A field with what it means and its bounds, ge and le or choices. A callable default makes a new one each time."""
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"help": help, **bounds})


def random_seed() -> int:
    """A seed for those who name none."""
    return secrets.randbelow(1 << 31)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Which take half a millisecond to be found."""
    return get_type_hints(kind)


def check(values: Any) -> None:  # Any: a dataclass instance
    """Raise RequestError for the first field outside its type or bounds. Whole numbers may come as 2.0, as JSON has
    them, and leave as 2."""
    kind: type = type(values)
    hints = _hints(kind)
    for item in fields(values):
        value = getattr(values, item.name)
        accepted = get_args(hints[item.name]) or (hints[item.name],)
        if value is None and type(None) in accepted:
            continue
        value = _typed(item.name, value, accepted)
        _check_bounds(item.name, value, item.metadata)
        object.__setattr__(values, item.name, value)


def _typed(name: str, value: Any, accepted: tuple[Any, ...]) -> Any:
    kind = accepted[0]  # before None, where that is accepted
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind is float:
            return float(value)
        if kind is int and value == value // 1:  # neither 1.5 nor nan
            return int(value)
    elif isinstance(value, kind) if kind not in _KINDS else type(value) is kind:
        if kind is str and HALF_CHARACTER.search(value):
            raise RequestError(f"{name} has half a character in it. Expected text.")
        return value
    raise RequestError(f"{name} is {value!r}. Expected {_KINDS.get(kind, 'an image that Pillow has opened')}.")


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if "choices" in bounds and value not in bounds["choices"]:
        raise RequestError(f"{name} is {value!r}. Expected one of {', '.join(bounds['choices'])}.")
    if "ge" in bounds and not bounds["ge"] <= value <= bounds["le"]:
        raise RequestError(f"{name} is {value}. Expected {bounds['ge']} to {bounds['le']}.")
