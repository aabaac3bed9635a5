"""What a training learns of its pictures: what their hash knows, and the trigger in every caption."""

from dataclasses import replace

import pytest

from klora.training.dataset import Picture, captioned, dataset_hash
from test_folder.uploads.packing import PNG


def test_the_hash_knows_images_captions_and_masks_but_no_names_and_no_order() -> None:
    a, b = Picture("a", b"1", "one", None), Picture("b", b"2", None, b"m")
    same = [[a, b], [b, a], [replace(a, name="z"), b]]
    others = [[a], [a, a, b], [replace(a, data=b"x"), b], [replace(a, caption="x"), b], [replace(a, caption=None), b],
              [replace(a, caption=""), b], [a, replace(b, mask=None)], [a, replace(b, mask=b"x")],
              [replace(a, caption=None), replace(b, caption="one")]]  # fmt: skip
    assert len({dataset_hash(pictures) for pictures in same}) == 1
    assert len({dataset_hash(pictures) for pictures in [same[0], *others]}) == 1 + len(others)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (None, "a sbu dog"), ("a photo of a dog", "sbu, a photo of a dog"), ("a [trigger] dog", "a sbu dog"),
        ("[trigger] and [trigger]", "sbu and sbu"), ("sbu", "sbu"), ("a (sbu) dog", "a (sbu) dog"),
        ("in sbuburbia", "sbu, in sbuburbia"), ("an unsbu", "sbu, an unsbu"), ("SBU", "sbu, SBU"),
    ],
)  # fmt: skip
def test_the_trigger_is_in_every_caption(caption: str | None, expected: str) -> None:
    assert captioned(Picture("x", PNG, caption, None), "sbu", "a [trigger] dog") == expected


def test_a_trigger_is_text_and_no_pattern() -> None:
    assert captioned(Picture("x", PNG, "a cat", None), "s.u(", "") == "s.u(, a cat"
    assert captioned(Picture("x", PNG, "a s.u( cat", None), "s.u(", "") == "a s.u( cat"


def test_a_template_is_taken_at_its_word() -> None:
    assert captioned(Picture("x", PNG, None, None), "sbu", "a dog") == "a dog"
