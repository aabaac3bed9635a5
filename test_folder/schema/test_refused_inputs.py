"""Forms of an input that Cog drops, garbles or passes over are refused, with the line that they are in."""

from pathlib import Path

import pytest

from test_folder.schema.project import refusal, write_project


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
