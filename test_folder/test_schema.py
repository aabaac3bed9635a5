"""script/schema against Cog: forms it must read, forms it must refuse, and the real server on what it writes."""

import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import cog
import pytest
from cog import _adt, _inspector

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "script" / "schema"


def load(name: str, path: Path) -> ModuleType:
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


schema = load("schema", PROGRAM)

IMPORTS = """from typing import Iterator, List, Optional, Union
from cog import BaseModel, BasePredictor, Input, Path, Secret
"""


def write_project(root: Path, *inputs: str, before: str = "", output: str = "str", imports: str = IMPORTS) -> Path:
    """A project whose predict has these inputs, one a line."""
    signature = "".join(f"        {line},\n" for line in inputs)
    body = f"    def predict(\n        self,\n{signature}    ) -> {output}:\n        return None\n"
    (root / "cog.yaml").write_text('build:\n  gpu: true\npredict: "predict.py:Predictor"\n')
    (root / "predict.py").write_text(f"{imports}{before}\n\nclass Predictor(BasePredictor):\n{body}")
    return root


def write_training(root: Path, text: str) -> Path:
    """The same project with a train function beside predict."""
    with (root / "cog.yaml").open("a") as file:
        file.write("train: train.py:train\n")
    (root / "train.py").write_text(IMPORTS + text)
    return root


def components(root: Path) -> dict[str, Any]:
    schemas: dict[str, Any] = schema.schema_of(root)["components"]["schemas"]
    return schemas


def refusal(root: Path) -> str:
    with pytest.raises(schema.SchemaError) as error:
        schema.schema_of(root)
    return str(error.value)


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
    ("line", "seen", "before"),
    [
        # choices that Cog cannot resolve
        ('x: str = Input(description="d", choices=FAR)', "choices=FAR", "from far import FAR"),
        ('x: str = Input(description="d", choices=far.CH)', "choices=far.CH", "import far"),
        ('x: str = Input(description="d", choices={"a", "b"})', "choices={", ""),
        ('x: str = Input(description="d", choices=("a", "b"))', "choices=(", ""),
        ('x: str = Input(description="d", choices=sorted(CH))', "sorted(CH)", 'CH = ["a"]'),
        ('x: str = Input(description="d", choices=list(D))', "list(D)", 'D = {"a": 1}'),
        ('x: str = Input(description="d", choices=D.keys())', "D.keys()", 'D = {"a": 1}'),
        ('x: str = Input(description="d", choices=list(D.items()))', "D.items()", 'D = {"a": 1}'),
        ('x: str = Input(description="d", choices=list(D.keys()))', "D.keys()", "D = {'a': print}"),
        ('x: str = Input(description="d", choices=list(D.keys()))', "D.keys()", "D = {**{'a': 1}}"),
        ('x: str = Input(description="d", choices=list(CH.keys()))', "CH.keys()", 'CH = ["a"]'),
        ('x: str = Input(description="d", choices=D)', "choices=D", 'D = {"a": 1}'),
        ('x: str = Input(description="d", choices=[c for c in CH])', "[c for c in CH]", 'CH = ["a"]'),
        ('x: str = Input(description="d", choices=[*CH])', "[*CH]", 'CH = ["a"]'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = ["a"] + ["b"]'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'if True:\n    CH = ["a"]'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = ["a"]\nCH += ["b"]'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = ["a"]\nCH = ["b"]'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = DH = ["a"]'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = "a", "b"'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = (["a", "b"])'),
        ('x: str = Input(description="d", choices=CH)', "choices=CH", 'CH = [\n    "a",  # first\n]'),
        ('x: str = Input(description="d", choices=["a", ("b")])', '("b")', ""),
        ('x: str = Input(description="d", choices=["a" "b"])', '"a" "b"', ""),
        ('x: str = Input(description="d", choices=["a", f"b"])', 'f"b"', ""),
        ('x: str = Input(description="d", choices=["a\\n"])', "a\\n", ""),
        ('x: str = Input(description="d", choices=[])', "choices=[]", ""),
        ('x: str = Input(description="d", choices=["a", "a"])', '["a", "a"]', ""),
        ('x: str = Input(description="d", choices=[1, 2])', "choices=[1, 2]` on str", ""),
        ('x: int = Input(description="d", choices=[True, 2])', "[True, 2]", ""),
        ('x: list[str] = Input(description="d", choices=["a"])', 'choices=["a"]` on list[str]', ""),
        ('x: Path = Input(description="d", choices=["a"])', "on Path", ""),
        ('x: bool = Input(description="d", choices=[True, False])', "on bool", ""),
        # defaults that Cog drops, or does not check
        ('x: int = Input(description="d", default=2 * 512)', "default=2 * 512", ""),
        ('x: int = Input(description="d", default=N)', "default=N", "N = 2 * 512"),
        ('x: int = Input(description="d", default=N)', "default=N", "from far import N"),
        ('x: int = Input(description="d", default=far.N)', "default=far.N", "import far"),
        ('x: int = Input(description="d", default=int("1"))', 'int("1")', ""),
        ('x: int = Input(description="d", default=(1))', "default=(1)", ""),
        ('x: int = Input(description="d", default=- 1)', "default=- 1", ""),
        ('x: int = Input(description="d", default=0x10)', "default=0x10", ""),
        ('x: int = Input(description="d", default=9999999999999999999)', "9999999999999999999", ""),
        ('x: int = Input(description="d", default=...)', "default=...", ""),
        ('x: str = Input(description="d", default=("a" "b"))', '("a" "b")', ""),
        ('x: str = Input(description="d", default="a" "b")', '"a" "b"', ""),
        ('x: str = Input(description="d", default=f"a")', 'f"a"', ""),
        ('x: str = Input(description="d", default=b"a")', 'b"a"', ""),
        ('x: str = Input(description="d", default=R"a")', 'R"a"', ""),
        ('x: str = Input(description="d", default=r"""a""")', 'r"""a"""', ""),
        ('x: str = Input(description="d", default="\\u00e9")', "\\u00e9", ""),
        ('x: list[int] = Input(description="d", default=[1,  # one\n 2])', "default=[1, # one 2]", ""),
        ('x: list[int] = Input(description="d", default=(1, 2))', "(1, 2)", ""),
        ('x: list[str] = Input(description="d", default=[1])', "[1]", ""),
        ('x: int = Input(description="d", default="1")', '"1"` on int', ""),
        ('x: int = Input(description="d", default=1.5)', "1.5", ""),
        ('x: int = Input(description="d", default=True)', "True", ""),
        ('x: Path = Input(description="d", default="a.png")', "a.png", ""),
        ('x: Secret = Input(description="d", default="key")', "key", ""),
        ('x: int = Input(description="d", default=None)', "default=None` on int; accepted: ", ""),
        ('x: str = Input(description="d", default=None)', "Optional[...]", ""),
        ('x: Path = Input(description="d", default=None)', "Optional[...]", ""),
        ('x: list[int] = Input(description="d", default=None)', "Optional[...]", ""),
        ('x: str = Input(description="d", choices=["a"], default="b")', "default='b'", ""),
        ('x: int = Input(description="d", ge=1, default=0)', "accepted: a default from 1 to None", ""),
        ('x: float = Input(description="d", le=1.5, default=2)', "from None to 1.5", ""),
        ('x: str = Input(description="d", max_length=1, default="ab")', "from None to 1", ""),
        # arguments that Cog passes over
        ('x: str = Input("a", description="d")', '"a"', ""),
        ('x: str = Input(description="d", **kw)', "**kw", "kw = {}"),
        ('x: str = Input(description="d", maximum=3)', "maximum=3", ""),
        ('x: str = Input(description="d", default_factory=str)', "default_factory=str", ""),
        # descriptions that Cog drops or garbles
        ("x: str = Input()", "saw none; accepted: a description", ""),
        ("x: str", "accepted: = Input(description=...)", ""),
        ('x: str = "a"', "accepted: = Input(description=...)", ""),
        ('x: str = Input(description="")', 'description=""', ""),
        ('x: str = Input(description=("a" "b"))', 'description=("a" "b")', ""),
        ('x: str = Input(description=("a"))', 'description=("a")', ""),
        ('x: str = Input(description="a" "b")', '"a" "b"', ""),
        ('x: str = Input(description="a"\n"b")', '"a" "b"', ""),
        ('x: str = Input(description=f"a")', 'f"a"', ""),
        ('x: str = Input(description="a" + "b")', '"a" + "b"', ""),
        ('x: str = Input(description="a".format())', '"a".format()', ""),
        ('x: str = Input(description="a\\"b")', 'a\\"b', ""),
        ('x: str = Input(description="a\\\\b")', "a\\\\b", ""),
        ('x: str = Input(description="""a\\nb""")', "a\\nb", ""),
        ("x: str = Input(description=D)", "description=D", 'D = "a" "b"'),
        # bounds that Cog drops, or that act on nothing
        ('x: int = Input(description="d", le=N)', "le=N", "N = 3"),
        ('x: int = Input(description="d", le=2**32 - 1)', "le=2**32 - 1", ""),
        ('x: int = Input(description="d", ge=(1))', "ge=(1)", ""),
        ('x: int = Input(description="d", ge=True)', "ge=True", ""),
        ('x: int = Input(description="d", ge=0x10)', "ge=0x10", ""),
        ('x: str = Input(description="d", ge=1)', "`ge=1` on str", ""),
        ('x: list[int] = Input(description="d", ge=1)', "`ge=1` on list[int]", ""),
        ('x: str = Input(description="d", min_length=N)', "min_length=N", "N = 3"),
        ('x: str = Input(description="d", max_length=2.5)', "max_length=2.5", ""),
        ('x: str = Input(description="d", min_length=-1)', "min_length=-1", ""),
        ('x: int = Input(description="d", max_length=3)', "on int", ""),
        ('x: str = Input(description="d", regex=R)', "regex=R", 'R = "a"'),
        ('x: str = Input(description="d", regex="a\\\\d")', "regex=", ""),
        ('x: str = Input(description="d", regex=r"(")', 'regex=r"("', ""),
        ('x: str = Input(description="d", regex=r"a\\Z")', 'regex=r"a\\Z"', ""),
        ('x: str = Input(description="d", regex=r"(?P<a>b)")', "(?P<a>b)", ""),
        ('x: str = Input(description="d", regex=r"a{,3}")', "a{,3}", ""),
        ('x: int = Input(description="d", regex=r"a")', "on int", ""),
        ('x: str = Input(description="d", deprecated=OLD)', "deprecated=OLD", "OLD = True"),
        ('x: str = Input(description="d", accept="image/*")', "on str", ""),
        # types
        ('x = Input(description="d")', "saw `x`; accepted: str", ""),
        ('x: Literal["a", "b"] = Input(description="d")', 'Literal["a", "b"]', "from typing import Literal"),
        ('x: Colour = Input(description="d")', "Colour", "class Colour(str, Enum): pass"),
        ('x: tuple[int, int] = Input(description="d")', "tuple[int, int]", ""),
        ('x: Model = Input(description="d")', "Model", "class Model(BaseModel): pass"),
        ('x: Path | str = Input(description="d")', "Path | str", ""),
        ('x: int | str = Input(description="d", ge=1)', "int | str", ""),
        ('x: Union[int, str] = Input(description="d")', "Union[int, str]", ""),
        ('x: int | float | None = Input(description="d")', "int | float | None", ""),
        ('x: Optional[int | str] = Input(description="d")', "Optional[int | str]", ""),
        ('x: list[Optional[int]] = Input(description="d")', "list[Optional[int]]", ""),
        ('x: list[Secret] = Input(description="d")', "list[Secret]", ""),
        ('x: list = Input(description="d")', "x: list", ""),
        ('x: dict = Input(description="d")', "x: dict", ""),
        ('x: (str) = Input(description="d")', "x: (str)", ""),
        ('x: str = choose(description="d")', "choose(", ""),
        ('x: str = cog.Input(description="d")', "cog.Input(", "import cog"),
        ('*x: str, y: str = Input(description="d")', "given by name", ""),
    ],
)
def test_input_form_is_refused(tmp_path: Path, line: str, seen: str, before: str) -> None:
    root = write_project(tmp_path, line, before=before)
    number = (root / "predict.py").read_text().splitlines().index("        self,") + 2
    message = refusal(root)
    assert seen in message
    assert "input 'x': saw " in message
    assert "; accepted: " in message
    assert message.split(": ")[0] == f"predict.py:{number}"
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("name", "module"), [("Path", "pathlib"), ("Secret", "far"), ("Input", "far"), ("Path as Path", "pathlib")]
)
def test_name_from_elsewhere_is_not_taken_for_cogs(tmp_path: Path, name: str, module: str) -> None:
    root = write_project(
        tmp_path,
        'x: Path = Input(description="d")',
        'y: Secret = Input(description="d")',
        imports=f"from cog import BasePredictor, Input, Path, Secret\nfrom {module} import {name}\n",
    )
    assert "saw `" in refusal(root)


@pytest.mark.parametrize(
    ("output", "before"),
    [
        ("None", ""),
        ("Optional[str]", ""),
        ("str | None", ""),
        ("int | str", ""),
        ("tuple[int, str]", ""),
        ("Secret", ""),
        ("Iterator[Optional[str]]", ""),
        ("dict", ""),
        ("Far", "from far import Far"),
        ("Plain", "class Plain:\n    a: str"),
    ],
)
def test_output_form_is_refused(tmp_path: Path, output: str, before: str) -> None:
    message = refusal(write_project(tmp_path, 'x: str = Input(description="d")', before=before, output=output))
    assert f"output of predict: saw `{output}`; accepted: " in message


def test_missing_return_type_is_refused(tmp_path: Path) -> None:
    root = write_project(tmp_path, 'x: str = Input(description="d")')
    path = root / "predict.py"
    path.write_text(path.read_text().replace(" -> str", ""))
    assert "predict.py:6: output of predict: saw `no type`" in refusal(root)


@pytest.mark.parametrize("field", ["a: Far", "a: int | str", "a: Secret", "a: str = print()", "a: Literal['b']"])
def test_output_field_is_refused(tmp_path: Path, field: str) -> None:
    before = f"class Model(BaseModel):\n    {field}\n"
    message = refusal(write_project(tmp_path, before=before, output="Model"))
    assert message.startswith(f"predict.py:4: output field 'a': saw `{field}`; accepted: ")


def test_decorator_is_refused(tmp_path: Path) -> None:
    root = write_project(tmp_path)
    path = root / "predict.py"
    path.write_text(path.read_text().replace("    def", "    @torch.inference_mode()\n    def"))
    assert refusal(root).startswith("predict.py:6: predict: saw `torch.inference_mode()`; accepted: no decorator")


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("predict(", "forecast(", "saw no predict; accepted: one"),
        ("predict(", "run(", "saw `def run(`; accepted: one"),
        (
            "        return None\n",
            "        return None\n    def run(self) -> str: ...\n",
            "saw `def predict(` and `def run(self)",
        ),
        ("class Predictor", "class Other", "saw no Predictor; accepted: one"),
        ("class Predictor", "class Predictor: ...\nclass Predictor", "saw `class Predictor: ...` and `class"),
        ("        self,\n", "", "saw no self"),
        ("        self,\n", "        self: 'Predictor',\n", "saw no self"),
        ('"d"),', '"d"), /,', "given by name"),
        ("x: str", 'x: str = Input(description="d"), x: str', "duplicate argument 'x'"),
        ('description="d"', 'description="d", description="e"', "keyword argument repeated"),
        ("return None", "return (", "accepted: valid Python"),
    ],
)
def test_definition_is_refused(tmp_path: Path, old: str, new: str, seen: str) -> None:
    root = write_project(tmp_path, 'x: str = Input(description="d")')
    path = root / "predict.py"
    path.write_text(path.read_text().replace(old, new, 1))
    message = refusal(root)
    assert message.startswith("predict.py:")
    assert seen in message


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("build:\n  gpu: true\n", "predict: saw no such key"),
        ("build:\n  predict: predict.py:Predictor\n", "predict: saw no such key"),
        ("predict: Predictor\n", "predict: saw Predictor"),
        ("predict: predict.py:Predictor\ntrain: train.py\n", "train: saw train.py"),
    ],
)
def test_unreadable_cog_yaml_is_refused(tmp_path: Path, text: str, seen: str) -> None:
    (tmp_path / "cog.yaml").write_text(text)
    assert seen in refusal(tmp_path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    assert "predict: saw no such key" in refusal(tmp_path)
    (tmp_path / "cog.yaml").write_text("predict: predict.py:Predictor")
    assert refusal(tmp_path) == "predict.py: saw No such file or directory; accepted: a file of the project."


def test_predict_and_train_may_share_a_name_only_with_the_same_choices(tmp_path: Path) -> None:
    line = 'base: str = Input(description="d", choices=["a", "b"])'
    root = write_training(write_project(tmp_path, line), f"def train({line}) -> Path: ...\n")
    assert components(root)["base"]["enum"] == ["a", "b"]
    (root / "train.py").write_text((root / "train.py").read_text().replace('"b"', '"c"'))
    assert refusal(root).startswith("train.py:3: input 'base': saw a name that has other choices already")


@pytest.mark.parametrize("name", ["Status", "Input", "PredictionRequest"])
def test_choices_may_not_take_the_name_of_a_component(tmp_path: Path, name: str) -> None:
    root = write_project(tmp_path, f'{name}: str = Input(description="d", choices=["a"])')
    assert "accepted: another name" in refusal(root)


def test_train_must_be_one_plain_function(tmp_path: Path) -> None:
    root = write_training(write_project(tmp_path), "class train:\n    def predict(self) -> Path: ...\n")
    assert refusal(root) == "train.py:3: train: saw `class train:`; accepted: one function."


def test_training_has_its_own_components_and_paths(tmp_path: Path) -> None:
    model = "class Result(BaseModel):\n    weights: Path\n    loss_curve: Optional[str]\n    note: str = ''\n\n"
    train = 'def train(images: Path = Input(description="d")) -> Result:\n    return None\n'
    root = write_training(write_project(tmp_path, output="list[Path]"), model + train)
    document = schema.schema_of(root)
    assert list(document["paths"]) == [
        "/",
        "/health-check",
        "/predictions",
        "/predictions/{prediction_id}/cancel",
        "/trainings",
        "/trainings/{training_id}/cancel",
    ]
    schemas = document["components"]["schemas"]
    assert schemas["TrainingInput"]["required"] == ["images"]
    assert schemas["TrainingOutput"] == {
        "title": "Output",
        "type": "object",
        "properties": {
            "weights": {"title": "Weights", "type": "string", "format": "uri"},
            "loss_curve": {"title": "Loss Curve", "type": "string", "nullable": True},
            "note": {"title": "Note", "type": "string"},
        },
        "required": ["weights"],
    }
    assert schemas["TrainingRequest"]["properties"]["input"] == {"$ref": "#/components/schemas/TrainingInput"}
    assert schemas["TrainingResponse"]["properties"]["output"] == {"$ref": "#/components/schemas/TrainingOutput"}


def test_every_reference_in_the_document_resolves(tmp_path: Path) -> None:
    line = 'base: str = Input(description="d", choices=["a", "b"])'
    root = write_training(write_project(tmp_path, line), f"def train({line}) -> Path: ...\n")
    document = schema.schema_of(root)

    def references(value: Any) -> Iterator[str]:
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        yield from (value["$ref"],) if isinstance(value, dict) and "$ref" in value else ()
        for child in children:
            yield from references(child)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) == known - {"#/components/schemas/Status"}


def test_document_has_the_fixed_components_of_cog(tmp_path: Path) -> None:
    date = {"type": "string", "format": "date-time"}
    assert components(write_project(tmp_path)) == {
        "Input": {"title": "Input", "type": "object", "properties": {}},
        "Output": {"title": "Output", "type": "string"},
        "PredictionRequest": {
            "title": "PredictionRequest",
            "type": "object",
            "properties": {"id": {"title": "Id", "type": "string"}, "input": {"$ref": "#/components/schemas/Input"}},
        },
        "PredictionResponse": {
            "title": "PredictionResponse",
            "type": "object",
            "properties": {
                "input": {"$ref": "#/components/schemas/Input"},
                "output": {"$ref": "#/components/schemas/Output"},
                "id": {"title": "Id", "type": "string"},
                "version": {"title": "Version", "type": "string"},
                "created_at": {"title": "Created At"} | date,
                "started_at": {"title": "Started At"} | date,
                "completed_at": {"title": "Completed At"} | date,
                "status": {"title": "Status", "type": "string"},
                "error": {"title": "Error", "type": "string"},
                "logs": {"title": "Logs", "type": "string"},
                "metrics": {"title": "Metrics", "type": "object"},
            },
        },
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {
                "detail": {
                    "title": "Detail",
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/ValidationError"},
                }
            },
        },
        "ValidationError": {
            "title": "ValidationError",
            "required": ["loc", "msg", "type"],
            "type": "object",
            "properties": {
                "loc": {
                    "title": "Location",
                    "type": "array",
                    "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                },
                "msg": {"title": "Message", "type": "string"},
                "type": {"title": "Error Type", "type": "string"},
            },
        },
    }


def test_prediction_endpoints_are_those_of_cog(tmp_path: Path) -> None:
    def answer(description: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": content}}}

    invalid = answer("Validation Error", {"$ref": "#/components/schemas/HTTPValidationError"})
    paths = schema.schema_of(write_project(tmp_path))["paths"]
    assert paths["/predictions"]["post"] == {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": {
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}
        },
        "responses": {
            "200": answer("Successful Response", {"$ref": "#/components/schemas/PredictionResponse"}),
            "422": invalid,
        },
    }
    assert paths["/predictions/{prediction_id}/cancel"]["post"] == {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [
            {
                "required": True,
                "schema": {"title": "Prediction Id", "type": "string"},
                "name": "prediction_id",
                "in": "path",
            }
        ],
        "responses": {"200": answer("Successful Response", {}), "422": invalid},
    }
    assert paths["/health-check"]["get"] == {
        "summary": "Healthcheck",
        "operationId": "healthcheck_health_check_get",
        "responses": {"200": answer("Successful Response", {})},
    }


def test_document_names_the_cog_that_is_installed(tmp_path: Path) -> None:
    info = schema.schema_of(write_project(tmp_path))["info"]
    assert info == {"title": "Cog", "version": importlib.metadata.version("cog")}


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


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [("str", str), ("Path", cog.Path), ("list[Path]", list[cog.Path]), ('"Iterator[Path]"', Iterator[cog.Path])],
)
def test_output_type_has_the_shape_that_cogs_own_inspector_gives(tmp_path: Path, annotation: str, kind: Any) -> None:
    output = components(write_project(tmp_path, output=annotation))["Output"]
    assert output == _inspector._create_output_type(kind).json_type()


SAMPLE = """from __future__ import annotations
import json
from typing import Optional
from cog import BasePredictor, Input, Path, Secret

SIZES = {"small": (512, 512), "large": (1024, 1024)}
STYLES = ["ink", "oil"]
STEPS = 28


class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(description="What to draw."),
        style: str = Input(description="A style.", choices=STYLES + ["none"], default="none"),
        size: str = Input(description="A size.", choices=list(SIZES.keys()), default="small"),
        rank: int = Input(description="A rank.", choices=[4, 8], default=4),
        steps: int = Input(description="Steps.", default=STEPS, ge=1, le=1_000),
        scale: float = Input(description="A scale.", default=-1e-4, ge=-2.5, le=2.0),
        seed: Optional[int] = Input(description="A seed.", le=2147483647),
        word: str = Input(description="A word.", default="ab", min_length=1, max_length=5, regex=r"^\\w+$"),
        tags: list[str] = Input(description="Tags.", default=[]),
        flag: bool = Input(description="A flag.", default=False, deprecated=True),
        token: Secret = Input(description="A token.", default=None),
        key: Optional[Secret] = Input(description="A key.", default=None),
        image: Path | None = Input(description="An image.", accept="image/*"),
        pages: Optional[list[Path]] = Input(description="Pages."),
    ) -> str:
        given = {name: value for name, value in locals().items() if name != "self"}
        return json.dumps({name: [type(value).__name__, read(value)] for name, value in given.items()})


def read(value: object) -> object:
    if isinstance(value, Path):
        return value.read_text()
    if isinstance(value, list):
        return [read(item) for item in value]
    return value.get_secret_value() if isinstance(value, Secret) else value
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample")
    (root / "cog.yaml").write_text("predict: predict.py:Predictor  # here\n")
    (root / "predict.py").write_text(SAMPLE)
    subprocess.run([sys.executable, str(PROGRAM), "--root", str(root)], check=True, capture_output=True)
    return root


@pytest.mark.filterwarnings("ignore:.* deprecated; use:DeprecationWarning")
def test_schema_says_what_python_says(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sample_predict", load("sample_predict", sample / "predict.py"))
    inputs = _inspector.create_predictor("sample_predict", "Predictor").inputs
    schemas = json.loads((sample / ".cog" / "openapi_schema.json").read_text())["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    for name, field in inputs.items():
        written = properties[name]
        assert written["x-order"] == field.order
        assert written["description"] == field.description
        assert written.get("default") == field.default
        assert (written.get("minimum"), written.get("maximum")) == (field.ge, field.le)
        assert (written.get("minLength"), written.get("maxLength")) == (field.min_length, field.max_length)
        assert written.get("pattern") == field.regex
        assert written.get("deprecated") == field.deprecated
        assert schemas.get(name, {}).get("enum") == field.choices
    assert properties.keys() == inputs.keys()
    assert schemas["Input"]["required"] == ["prompt"]


class Server:
    """Cog's real server on a project, at a loopback port."""

    def __init__(self, root: Path, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the worker is started as `python`
        stub = {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "PORT": str(port), "PATH": path}
        command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            command, cwd=root, env=os.environ | stub, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def predict(self, **inputs: Any) -> tuple[int, dict[str, Any]]:
        """Answer to a prediction, asked for when the server is ready: right after another it answers 409."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if self.call("/health-check")[1]["status"] == "READY":
                    status, answer = self.call("/predictions", {"input": inputs})
                    if status != 409:
                        return status, answer
            except urllib.error.URLError:
                assert self.process.poll() is None, "the server ended"
            time.sleep(0.02)
        raise TimeoutError("the server was not ready within 30 seconds")


@pytest.fixture(scope="module")
def server(sample: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(sample, port)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(5)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.mark.parametrize(
    ("inputs", "field", "message"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": "x", "style": "zzz"}, "style", '"zzz" is not one of ["ink","oil","none"]'),
        ({"prompt": "x", "rank": 5}, "rank", "5 is not one of [4,8]"),
        ({"prompt": "x", "steps": 0}, "steps", "0 is less than the minimum of 1"),
        ({"prompt": "x", "steps": 1001}, "steps", "1001 is greater than the maximum of 1000"),
        ({"prompt": "x", "steps": "2"}, "steps", '"2" is not of type "integer"'),
        ({"prompt": "x", "scale": 3}, "scale", "3 is greater than the maximum of 2"),
        ({"prompt": "x", "scale": -2.6}, "scale", "-2.6 is less than the minimum of -2.5"),
        ({"prompt": "x", "word": "toolong"}, "word", '"toolong" is longer than 5 characters'),
        ({"prompt": "x", "word": "a b"}, "word", '"a b" does not match "^\\w+$"'),
        ({"prompt": "x", "tags": [1]}, "tags/0", '1 is not of type "string"'),
        ({"prompt": "x", "seed": None}, "seed", 'null is not of type "integer"'),
    ],
)
def test_server_refuses_what_the_schema_forbids(
    server: Server, inputs: dict[str, Any], field: str, message: str
) -> None:
    status, answer = server.predict(**inputs)
    assert status == 422
    assert [(error["loc"], error["msg"]) for error in answer["detail"]] == [(["body", "input", field], message)]


def test_server_fills_in_defaults_and_lets_optional_inputs_out(server: Server) -> None:
    status, answer = server.predict(prompt="x")
    assert status == 200
    assert json.loads(answer["output"]) == {
        "prompt": ["str", "x"],
        "style": ["str", "none"],
        "size": ["str", "small"],
        "rank": ["int", 4],
        "steps": ["int", 28],
        "scale": ["float", -0.0001],
        "seed": ["NoneType", None],
        "word": ["str", "ab"],
        "tags": ["list", []],
        "flag": ["bool", False],
        "token": ["NoneType", None],
        "key": ["NoneType", None],
        "image": ["NoneType", None],
        "pages": ["NoneType", None],
    }


def test_server_turns_text_into_secrets_and_paths(server: Server) -> None:
    page = "data:text/plain;base64,aGVsbG8="
    status, answer = server.predict(prompt="x", token="t", key="k", image=page, pages=[page, page])
    assert status == 200
    output = json.loads(answer["output"])
    assert output["token"] == ["Secret", "t"]
    assert output["key"] == ["Secret", "k"]
    assert output["image"] == ["Path", "hello"]
    assert output["pages"] == ["list", ["hello", "hello"]]


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), "--root", str(root), *options], capture_output=True, text=True, check=False)


def test_program_writes_the_file_and_one_line(tmp_path: Path) -> None:
    result = run(write_project(tmp_path, 'x: str = Input(description="d")', 'y: int = Input(description="d")'))
    path = tmp_path / ".cog" / "openapi_schema.json"
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{path}: 2 inputs\n", "")
    assert json.loads(path.read_text()) == schema.schema_of(tmp_path)


def test_check_writes_nothing(tmp_path: Path) -> None:
    result = run(write_project(tmp_path, 'x: str = Input(description="d")'), "--check")
    assert result.returncode == 0
    assert not (tmp_path / ".cog").exists()


def test_refusal_is_one_sentence_on_stderr_and_leaves_the_old_file(tmp_path: Path) -> None:
    root = write_project(tmp_path, "x: str = Input()")
    path = root / ".cog" / "openapi_schema.json"
    path.parent.mkdir()
    path.write_text("old")
    result = run(root)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "predict.py:8: input 'x': saw none; accepted: a description on every input.\n"
    assert path.read_text() == "old"


@pytest.mark.skipif(not (ROOT / "predict.py").exists(), reason="predict.py is not written yet")
def test_our_own_form_is_accepted() -> None:
    properties = components(ROOT)["Input"]["properties"]
    assert [field["x-order"] for field in properties.values()] == list(range(len(properties)))
