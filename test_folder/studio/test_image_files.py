"""Images are saved under their seeds and places, in the format and at the quality asked for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from klora.studio import save_images
from test_folder.studio.opening import request

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(("suffix", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_images_are_saved_in_the_format_of_their_name(tmp_path: Path, suffix: str, kind: str) -> None:
    paths = save_images({0: NOISE, 2: NOISE.copy()}, tmp_path / "new" / "folder", request(output_format=suffix))
    assert paths == [tmp_path / "new" / "folder" / f"klora_{name}.{suffix}" for name in ("7_0", "9_2")]
    assert [Image.open(path).format for path in paths] == [kind, kind]


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_quality_trades_size_for_likeness(tmp_path: Path, suffix: str) -> None:
    sizes, errors = [], []
    for quality in (0, 50, 80, 100):
        asked = request(output_format=suffix, output_quality=quality)
        path = save_images({0: NOISE}, tmp_path, asked)[0]
        sizes.append(path.stat().st_size)
        errors.append(np.abs(np.asarray(Image.open(path), int) - np.asarray(NOISE, int)).mean())
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


def test_png_is_exact_at_any_quality(tmp_path: Path) -> None:
    path = save_images({0: NOISE}, tmp_path, request(output_format="png", output_quality=0))[0]
    assert np.array_equal(Image.open(path), NOISE)
