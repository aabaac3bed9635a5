"""A reference may end in the sha256 of its file, and in no other fragment."""

import pytest

from klora.sources.reference import parse
from test_folder.references.parsing import PIN, refusal


@pytest.mark.parametrize(
    "text",
    ["hf:o/m", "civitai:1?fp=fp16", "replicate:o/m", "o/m", "https://a.example/x?a=1", "x.tar", "huggingface.co/o/m"],
)
def test_any_reference_can_be_pinned(text: str) -> None:
    pinned = parse(f"{text}#sha256={PIN.upper()}")
    assert (parse(text).pin, pinned.pin) == (None, PIN)
    assert pinned != parse(text)
    assert str(pinned) == f"{parse(text)}#sha256={PIN}"
    assert parse(str(pinned)) == pinned


@pytest.mark.parametrize("fragment", ["", "readme", "sha256=", "sha256=abc", f"sha1={PIN}", f"sha256={PIN}0", f"{PIN}"])
def test_a_fragment_that_is_no_pin_is_refused(fragment: str) -> None:
    assert "Expected nothing there, or #sha256= and 64 hex digits." in refusal(f"hf:o/m#{fragment}")
