"""Outputs, definitions and projects that Cog would not take are refused."""

from pathlib import Path

import pytest

from test_folder.schema.project import components, refusal, write_project, write_training


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
