"""Two LoRAs that flip."""

from pathlib import Path

import pytest
from torch import Tensor

from klora import Fusion, Schedule, fuse
from test_folder.export.exporting import STEPS, lora, pairs


@pytest.fixture(scope="module")
def fusion() -> Fusion:
    texts = [pairs(dict.fromkeys(names, (10, 14)), 3, seed) for seed, names in enumerate(("ab", "bc"), 5)]
    content, style = lora("content", 6, 0, text_encoder=texts[0]), lora("style", 5, 1, text_encoder=texts[1])
    return fuse(content, style)


@pytest.fixture(scope="module")
def wins(fusion: Fusion) -> Tensor:
    found = fusion.content_wins(Schedule.from_pattern("s"), STEPS)
    assert (found.any(0) & ~found.all(0)).any(), "no layer flips, and there is nothing to average"
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "fused.safetensors"
