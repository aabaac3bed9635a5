"""The `klora` command: images from a shell, without Cog. Its options are the form's fields, by the same names."""

import inspect
import logging
import time
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from PIL import Image

import weights
from klora.errors import KLoRAError
from klora.request import Request, open_image
from klora.studio import Studio, save_images

app = typer.Typer(help="K-LoRA: one LoRA's subject in another LoRA's style.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """K-LoRA: one LoRA's subject in another LoRA's style."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def fuse(out: Path, **given: Any) -> None:
    """Make images from a prompt and up to two LoRA files."""
    inputs = {name: value for name, value in given.items() if value is not None}
    try:
        for name, mode in (("image", "RGB"), ("mask", "L")):
            if name in inputs:
                inputs[name] = open_image(name, inputs[name], mode)
        request = Request(**inputs)
        named = {name: getattr(request, name) for name in ("content_lora", "style_lora") if getattr(request, name)}
        loras = {name: weights.lora_path(reference, Path.cwd(), name) for name, reference in named.items()}
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        studio = Studio(weights.find_base, weights.safety_checker_path())
        images = studio.make(request, loras, facts.__setitem__)
    except KLoRAError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    for path in save_images(images, out, request):
        typer.echo(path)
    share = f", style acts in {facts['style_share']:.0%}" if "style_share" in facts else ""
    typer.echo(f"seed {request.seed}{share}, {time.perf_counter() - started:.1f} s")


def _options() -> list[inspect.Parameter]:
    """One option for each field of Request; the prompt is the argument."""
    hints = get_type_hints(Request)
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, **_option(f, hints[f.name])) for f in fields(Request)
    ]
    out = Annotated[Path, typer.Option(help="Folder for the images.", file_okay=False)]
    return [*options, inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=Path("out"), annotation=out)]


def _option(item: "Field[Any]", hint: Any) -> dict[str, Any]:
    text = item.metadata["help"]
    if item.default is MISSING and item.default_factory is MISSING:
        return {"annotation": Annotated[str, typer.Argument(help=text)]}
    bounds = {"min": item.metadata["ge"], "max": item.metadata["le"]} if "ge" in item.metadata else {}
    default = None if item.default is MISSING else item.default
    if "choices" in item.metadata:
        hint = Literal[item.metadata["choices"]]
    elif hint == Image.Image | None:
        hint = Path
    hint = hint | None if default is None else hint
    return {"annotation": Annotated[hint, typer.Option(help=text, **bounds)], "default": default}


fuse.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
app.command()(fuse)
