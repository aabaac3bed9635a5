"""A form's fields as the options of a command. Knows typer, and no form."""

from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from PIL import Image

FILE: dict[str, Any] = {"exists": True, "dir_okay": False}
"""What typer is told of a path at which a file has to be."""


def options_of(verb: Callable[..., None], *forms: type, without: Collection[str]) -> Signature:
    """What typer reads: a verb's own parameters, and one for each field of dataclasses that it takes by **. without:
    fields that it has no use for; a parameter of its own stands for the field of its name."""
    parameters = [part for part in signature(verb).parameters.values() if part.kind is not part.VAR_KEYWORD]
    kind = Parameter.KEYWORD_ONLY
    hints = {name: hint for form in forms for name, hint in get_type_hints(form).items()}
    left_out = {*without, *(part.name for part in parameters)}
    items = [item for form in forms for item in fields(form) if item.name not in left_out]
    options = [Parameter(item.name, kind, **_option(item, hints[item.name])) for item in items]
    return Signature([part.replace(kind=kind) for part in (*options, *parameters)])


def _option(item: "Field[Any]", hint: Any) -> dict[str, Any]:
    text = item.metadata["help"].replace("[", r"\[")  # which typer would take for the name of a colour
    if item.default is MISSING and item.default_factory is MISSING:
        return {"annotation": Annotated[str, typer.Argument(help=text)]}
    bounds: dict[str, Any] = {"min": item.metadata["ge"], "max": item.metadata["le"]} if "ge" in item.metadata else {}
    default = None if item.default is MISSING else item.default
    if "choices" in item.metadata:
        hint = Literal[item.metadata["choices"]]
    elif hint == Image.Image | None:
        hint, bounds = Path, FILE
    hint = hint | None if default is None else hint
    flags = item.metadata.get("flags", ())
    return {"annotation": Annotated[hint, typer.Option(*flags, help=text, **bounds)], "default": default}
