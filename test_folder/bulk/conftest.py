"""A studio on tiny SDXL, a pair of LoRAs, and prompts that are run into a folder."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from klora.bulk.batch import DrawBatch
from klora.bulk.batches import Bulk
from klora.bulk.lines import PromptFile
from klora.bulk.run import run
from klora.cache import Borrowed
from klora.studio import Studio
from test_folder.bulk.prompting import CPU, PROMPTS, Runs, read, written
from test_folder.pairs import pair_of


@pytest.fixture(scope="session")
def pair(loras: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Borrowed]:
    """SDXL's, the style one with a trigger word in its file."""
    styled = tmp_path_factory.mktemp("styled") / "style.safetensors"
    save_file(load_file(loras / "sdxl_style.safetensors"), styled, {"trigger": "inky", "lora_type": "style"})
    return pair_of(loras) | {"style_lora": Borrowed(styled)}


@pytest.fixture(scope="session")
def studio(bases: Path) -> Studio:
    return Studio(lambda *_: ("sdxl", "sdxl", bases / "sdxl"), bases / "safety-checker", CPU)


@pytest.fixture
def draw(studio: Studio, pair: dict[str, Borrowed]) -> DrawBatch:
    """Requests with both LoRAs."""
    return lambda asked, check: studio.draw(asked, pair, check)


@pytest.fixture
def runs(draw: DrawBatch, tmp_path: Path) -> Runs:
    """Run a prompt file into a folder; what it said."""

    def run_(
        prompts: PromptFile, out: Path = tmp_path / "out", drawing: DrawBatch | None = draw, **given: Any
    ) -> list[str]:
        said: list[str] = []
        assert drawing is not None
        run(prompts, Bulk(**{"batch_size": 2, **given}), out, lambda: drawing, said.append)
        return said

    return run_


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    return read(written(tmp_path / "prompts.txt", *PROMPTS, "an inky pond", "a toy"))


@pytest.fixture
def shell(bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with LoRAs in it, and the tiny bases installed."""
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for role in ("content", "style"):
        (tmp_path / f"{role}.safetensors").write_bytes((loras / f"sdxl_{role}.safetensors").read_bytes())
    return tmp_path
