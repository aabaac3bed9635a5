"""Every form of an input that Cog reads is read, and says the same."""

from pathlib import Path
from typing import Any

import cog
import pytest
from cog import _adt

from test_folder.schema.project import components, write_project

STRING = {"title": "X", "type": "string", "description": "d", "x-order": 0}
INTEGER = {"title": "X", "type": "integer", "description": "d", "x-order": 0}
FLOAT = {"title": "X", "type": "number", "description": "d", "x-order": 0}


@pytest.mark.parametrize(
    ("line", "before", "expected"),
    [
        ('x: str = Input(description="d")', "", STRING),
        ("x: str = Input(description='d')", "", STRING),
        ('x: str = Input(description="""d""")', "", STRING),
        ('x: str = Input(description=r"d")', "", STRING),
        ("x: str = Input(description=D)", 'D = "d"', STRING),
        ("x: str = Input(description=D)", 'D: str = "d"  # why', STRING),
        ('x: str = Input(description="d # (é)")', "", STRING | {"description": "d # (é)"}),
        ('x: "str" = Input(description="d")', "", STRING),
        ('*, x: str = Input(description="d")', "", STRING),
        ('x: str = Input(description="d"), **rest', "", STRING),
        ('x: str = Input(description="d", default="")', "", STRING | {"default": ""}),
        ('x: str = Input(description="d", default=N)', 'N = "n"', STRING | {"default": "n"}),
        ('x: int = Input(description="d", default=-1)', "", INTEGER | {"default": -1}),
        ('x: int = Input(description="d", default=1_000)', "", INTEGER | {"default": 1000}),
        ('x: int = Input(description="d", default=N)', "N: int = 7", INTEGER | {"default": 7}),
        ('x: int = Input(description="d", ge=-2, le=2147483647)', "", INTEGER | {"minimum": -2, "maximum": 2147483647}),
        ('x: float = Input(description="d", default=1e-4)', "", FLOAT | {"default": 0.0001}),
        ('x: float = Input(description="d", default=1, ge=-2.5)', "", FLOAT | {"default": 1, "minimum": -2.5}),
        ('x: bool = Input(description="d", default=False)', "", STRING | {"type": "boolean", "default": False}),
        ('x: str = Input(description="d", min_length=0, max_length=9)', "", STRING | {"minLength": 0, "maxLength": 9}),
        ('x: str = Input(description="d", regex=r"^\\d{2}\\.$")', "", STRING | {"pattern": r"^\d{2}\.$"}),
        ('x: str = Input(description="d", deprecated=True)', "", STRING | {"deprecated": True}),
        ('x: Optional[str] = Input(description="d")', "", STRING | {"nullable": True}),
        ('x: str | None = Input(description="d")', "", STRING | {"nullable": True}),
        ('x: None | str = Input(description="d")', "", STRING | {"nullable": True}),
        ("x: 'Optional[ str ]' = Input(description='d')", "", STRING | {"nullable": True}),
        ('x: Optional["str"] = Input(description="d")', "", STRING | {"nullable": True}),
        ('x: Optional[int] = Input(description="d", default=None)', "", INTEGER | {"nullable": True, "default": None}),
        ('x: Optional[int] = Input(description="d", default=3)', "", INTEGER | {"nullable": True, "default": 3}),
        (
            'x: Path = Input(description="d", accept="image/*")',
            "",
            STRING | {"format": "uri", "x-cog-accept": "image/*"},
        ),
        (
            'x: Secret = Input(description="d")',
            "",
            STRING | {"format": "password", "writeOnly": True, "x-cog-secret": True},
        ),
        (
            'x: Secret = Input(description="d", default=None)',
            "",
            STRING | {"format": "password", "writeOnly": True, "x-cog-secret": True, "nullable": True, "default": None},
        ),
        (
            'x: list[Path] | None = Input(description="d")',
            "",
            STRING | {"type": "array", "items": {"type": "string", "format": "uri"}, "nullable": True},
        ),
        (
            'x: List[int] = Input(description="d", default=[1, -2])',
            "",
            STRING | {"type": "array", "items": {"type": "integer"}, "default": [1, -2]},
        ),
    ],
)
def test_input_form_is_read(tmp_path: Path, line: str, before: str, expected: dict[str, Any]) -> None:
    inputs = components(write_project(tmp_path, line, before=before))["Input"]
    required = {} if expected.keys() & {"default", "nullable"} else {"required": ["x"]}
    assert inputs == {"title": "Input", "type": "object", "properties": {"x": expected}} | required


@pytest.mark.parametrize(
    ("choices", "before", "expected"),
    [
        ('["a", "b"]', "", ["a", "b"]),
        ('[\n    "a", "b",\n]', "", ["a", "b"]),
        ("CH", 'CH = ["a", "b"]', ["a", "b"]),
        ("CH", 'CH: list[str] = ["a", "b"]', ["a", "b"]),
        ("CH", 'CH = (\n    "a",  # first\n    "b",\n)', ["a", "b"]),
        ("list(D.keys())", 'D = {"a": (1, 2), "b": {"c": None}}', ["a", "b"]),
        ("list(D.keys())", 'D = {\n    "a": 1,  # why\n    "b": 2,\n}', ["a", "b"]),
        ("list(D.values())", 'D = {"x": "a", "y": "b"}', ["a", "b"]),
        ('CH + ["z"]', 'CH = ["a", "b"]', ["a", "b", "z"]),
        ('["[a]"] + list(D.keys()) + CH', 'D = {"#b": 1}\nCH = ("c + d",)', ["[a]", "#b", "c + d"]),
    ],
)
def test_choices_form_is_read(tmp_path: Path, choices: str, before: str, expected: list[str]) -> None:
    line = f'x: str = Input(description="d", choices={choices})'
    schemas = components(write_project(tmp_path, line, before=before))
    assert schemas["x"] == {"title": "x", "description": "An enumeration.", "enum": expected, "type": "string"}
    assert schemas["Input"]["properties"]["x"] == {
        "allOf": [{"$ref": "#/components/schemas/x"}],
        "description": "d",
        "x-order": 0,
    }


@pytest.mark.parametrize("choices", ["[1, 2, -3]", "[4]"])
def test_choices_take_the_type_of_their_input(tmp_path: Path, choices: str) -> None:
    line = f'x: Optional[int] = Input(description="d", choices={choices}, default=None)'
    schemas = components(write_project(tmp_path, line))
    assert schemas["x"]["type"] == "integer"
    assert schemas["Input"]["properties"]["x"]["nullable"] is True


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ("str", str),
        ("int", int),
        ("float", float),
        ("bool", bool),
        ("Path", cog.Path),
        ("Secret", cog.Secret),
        ("Optional[Path]", cog.Path | None),
        ("list[Path]", list[cog.Path]),
        ("List[str] | None", list[str] | None),
    ],
)
def test_input_type_has_the_shape_that_cogs_own_inspector_gives(tmp_path: Path, annotation: str, kind: Any) -> None:
    field = components(write_project(tmp_path, f'x: {annotation} = Input(description="d")'))["Input"]["properties"]["x"]
    assert field.items() >= _adt.FieldType.from_type(kind).json_type().items()
