"""An input of the form -> something to fill in. The slider between subject and style is counted in doublings."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gradio as gr

from playground.form import Field, Kind

FEW = 5  # choices that are shown at once
STAR = "∗"  # Gradio reads what stands beneath a label as Markdown, where two asterisks slant all between them
WIDEST = 100  # of what a slider spans


def control(field: Field, **more: Any) -> gr.components.Component:
    """For one input, with its default, bounds and choices. more: options of the component."""
    said = {
        "label": label(field),
        "info": field.description.replace("*", STAR),
        "elem_id": f"input-{field.name}",
    } | more
    match field.kind:
        case Kind.CHOICE:
            return _choice(field, said)
        case Kind.SWITCH:
            return gr.Checkbox(bool(field.default), **said)
        case Kind.SECRET:
            return gr.Textbox(type="password", **said)
        case Kind.FILE:
            said["label"] = f"{said['label']}: {said.pop('info')}"
            types = [field.accept.removesuffix("/*")] if field.accept else None
            return gr.File(file_types=types, type="filepath", height=150, **said)
        case Kind.INTEGER | Kind.NUMBER:
            return _number(field, said)
    return gr.Textbox(field.default or "", max_lines=4, **said)


def told(value: str = "", **more: Any) -> gr.HTML:
    """What a screen reader says when it changes. more: options of the component."""
    return gr.HTML(value, js_on_load="element.setAttribute('aria-live', 'polite')", **more)


def label(field: Field) -> str:
    """Its name as words."""
    words = re.sub(r"\blora\b", "LoRA", field.name.replace("_", " "))
    return words[0].upper() + words[1:] + (" (needed)" if field.required else "")


def parted(fields: Iterable[Field], first: Sequence[str]) -> tuple[dict[str, Field], list[Field]]:
    """({name: field} of those named first that the form has, in that order; the others in the form's)."""
    known = {field.name: field for field in fields}
    return {name: known[name] for name in first if name in known}, [f for f in known.values() if f.name not in first]


def in_form_order(fields: Iterable[Field], controls: Mapping[str, Any]) -> tuple[list[Field], list[Any]]:
    """The fields that have a control, and those controls."""
    filled = [field for field in fields if field.name in controls]
    return filled, [controls[field.name] for field in filled]


def _choice(field: Field, said: dict[str, Any]) -> gr.components.Component:
    choices = [(choice, choice) for choice in field.choices]
    if field.default is None and not field.required:
        return gr.Dropdown([("–", ""), *choices], value="", **said)
    if len(choices) <= FEW:
        return gr.Radio(choices, value=field.default, **said)
    return gr.Dropdown(choices, value=field.default, **said)


def _number(field: Field, said: dict[str, Any]) -> gr.components.Component:
    """A slider where there are bounds and a beginning, else a text: Gradio's fields of numbers give 0 for a blank."""
    start = field.default if field.default is not None else field.blank
    if start is None or field.minimum is None or field.maximum is None or field.maximum - field.minimum > WIDEST:
        shown = "" if field.default is None else f"{field.default:g}"
        bounds = f"{field.minimum} to {field.maximum}" if field.minimum is not None and field.maximum else ""
        return gr.Textbox(shown, placeholder=bounds, max_lines=1, **said)
    return gr.Slider(field.minimum, field.maximum, start, step=field.step, **said)
