"""The playground's form is the schema's, and what is filled in becomes inputs."""

import base64
from pathlib import Path
from typing import Any

import pytest

from playground.errors import PlaygroundError
from playground.form import Field, Kind, inputs_of, read_form
from test_folder.speaking.answering import SCHEMAS


def test_the_form_is_the_schemas_without_what_is_deprecated() -> None:
    fields = read_form(SCHEMAS, "Input")
    by_name = {field.name: field for field in fields}
    assert [field.name for field in fields[:3]] == ["prompt", "content_lora", "style_lora"]
    assert by_name["prompt"].required
    assert "lora_weights" not in by_name
    assert by_name["pattern"].choices == ("auto", "s", "s*")
    assert by_name["hf_api_token"].kind is Kind.SECRET
    assert (by_name["image"].kind, by_name["image"].accept) == (Kind.FILE, "image/*")
    assert by_name["content_scale"].blank == 1
    assert by_name["beta"].blank is None, "it means one number for s and another for s*"
    assert (by_name["style_bias"].minimum, by_name["style_bias"].maximum) == (0, 10)


def test_blanks_stay_away_and_numbers_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    given: dict[str, Any] = {
        "prompt": "x", "content_lora": "", "model": "", "content_scale": 1, "style_scale": 2, "seed": " 7 ",
        "num_inference_steps": "", "go_fast": False, "image": str(tmp_path / "a.png"), "guidance_scale": "3.5",
        "hf_api_token": None,
    }  # fmt: skip
    fields = {field.name: field for field in read_form(SCHEMAS, "Input")}
    sent = inputs_of([fields[name] for name in given], given.values())
    image = "data:image/png;base64," + base64.b64encode(b"png").decode()
    numbers = {"style_scale": 2.0, "seed": 7, "guidance_scale": 3.5}
    assert sent == {"prompt": "x", "go_fast": False, "image": image} | numbers
    assert isinstance(sent["style_scale"], float)


def test_a_number_that_is_none_is_refused() -> None:
    seed = Field("seed", Kind.INTEGER, "", None, required=False)
    with pytest.raises(PlaygroundError, match=r"seed is 'seven'\. Expected a whole number\."):
        inputs_of([seed], ["seven"])
