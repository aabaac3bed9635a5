"""Small projects for script/schema, what it makes of them, and the sentence with which it refuses one."""

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
