"""Outputs that go elsewhere: --upload-url.

Cog uploads them side by side, so their order tells nothing; their names do.
"""

import io
import re

import numpy as np
import pytest
from PIL import Image

from test_folder.conformance.client import Client
from test_folder.conformance.hooks import Hooks

NAME = re.compile(r"/klora_(\d+)_(\d+)\.(png|jpg|webp)")


@pytest.mark.parametrize(("suffix", "kind"), [("png", "png"), ("jpg", "jpeg"), ("webp", "webp")])
def test_an_image_is_uploaded_as_what_it_is(uploader: Client, hooks: Hooks, suffix: str, kind: str) -> None:
    answer = uploader.succeeded(**uploader.mode.quick | {"output_format": suffix})
    [heard] = hooks.uploads(answer["id"])
    assert (heard.method, heard.headers["Content-Type"]) == ("PUT", f"image/{kind}")
    assert Image.open(io.BytesIO(heard.body)).format == kind.upper()
    assert answer["output"] == [f"{hooks.url}{heard.path}"]
    assert heard.path.endswith(f"/klora_7_0.{suffix}")


def test_every_image_is_uploaded_once_under_a_name_that_tells_seed_and_place(uploader: Client, hooks: Hooks) -> None:
    answer = uploader.succeeded(**uploader.mode.quick, num_outputs=4)
    paths = [heard.path for heard in hooks.uploads(answer["id"])]
    told = {tuple(map(int, NAME.search(path).groups()[:2])) for path in paths}
    assert len(paths) == 4
    assert told == {(7, 0), (8, 1), (9, 2), (10, 3)}
    assert sorted(answer["output"]) == sorted(f"{hooks.url}{path}" for path in paths)


def test_the_name_tells_which_image_it_is(uploader: Client, hooks: Hooks) -> None:
    """Whatever the order in which they came."""
    many = uploader.succeeded(**uploader.mode.quick, num_outputs=3)
    pixels = {int(NAME.search(one.path)[1]): decoded(one.body) for one in hooks.uploads(many["id"])}
    assert pixels.keys() == {7, 8, 9}
    for seed in pixels:
        alone = uploader.succeeded(**uploader.mode.quick | {"seed": seed})
        far = {other: np.abs(decoded(hooks.uploads(alone["id"])[0].body) - pixels[other]).mean() for other in pixels}
        assert min(far, key=far.get) == seed


def test_an_upload_that_fails_is_said_and_the_next_request_is_right(uploader: Client, hooks: Hooks) -> None:
    hooks.refusing = True
    try:
        error = uploader.error(**uploader.mode.quick)
    finally:
        hooks.refusing = False
    assert "Failed to upload output" in error and "500" in error
    assert len(uploader.succeeded(**uploader.mode.quick)["output"]) == 1


def test_webhooks_tell_the_addresses(uploader: Client, hooks: Hooks) -> None:
    asked = {"webhook": f"{hooks.url}/uploaded", "webhook_events_filter": ["completed"]}
    uploader.post(uploader.mode.quick | {"num_outputs": 2}, {"Prefer": "respond-async"}, **asked)
    last = hooks.end("uploaded")
    assert len(last["output"]) == 2
    assert all(NAME.search(address) for address in last["output"])


def decoded(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)), dtype=float)
