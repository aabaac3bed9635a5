"""What is asked for in vain is named."""

from typing import Any

import pytest

from test_folder.form.asked import PICTURE, request

PAIR = ("content", "style")
IDLE = [
    ({"style_scale": 2}, ["content"], "style_scale changes nothing: no style LoRA acts"),
    ({"content_scale": 0.5}, ["style"], "content_scale changes nothing: no content LoRA acts"),
    ({"content_scale": 0.5, "fusion": "style"}, PAIR, "content_scale changes nothing: no content LoRA acts"),
    ({"prompt_strength": 0.5}, PAIR, "prompt_strength changes nothing: there is no image to start from"),
    ({"megapixels": "2", "width": 64}, PAIR, "megapixels changes nothing: width or height is given"),
    ({"megapixels": "2", "height": 64}, PAIR, "megapixels changes nothing: width or height is given"),
    ({"output_quality": 9, "output_format": "png"}, PAIR, "output_quality changes nothing: png is exact"),
]  # fmt: skip
AT_WORK: list[dict[str, Any]] = [
    {"content_scale": 0.5, "style_scale": 2},
    {"content_scale": 0.5, "style_scale": 2, "fusion": "sum"},
    {"style_scale": 2, "fusion": "style"},
    {"prompt_strength": 0.5, "image": PICTURE},
    {"megapixels": "2", "output_quality": 9},
    {"output_quality": 9, "output_format": "jpg"},
    {"width": 64, "height": 64, "output_format": "png"},
]


@pytest.mark.parametrize(("given", "roles", "remark"), IDLE)
def test_what_changes_nothing_is_named(given: dict[str, Any], roles: list[str], remark: str) -> None:
    assert request(**given).remarks(roles) == [remark]


@pytest.mark.parametrize("given", AT_WORK)
def test_what_is_at_work_or_at_its_default_is_not(given: dict[str, Any]) -> None:
    assert request(**given).remarks(PAIR) == request().remarks([]) == []
