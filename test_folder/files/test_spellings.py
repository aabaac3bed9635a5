"""Every spelling of a LoRA file reads as the same layers, exactly, whatever its floating point."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.files import read_lora
from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import assert_same_bits, pair, read
from test_folder.files.spelling import SPELLINGS, attention, keyed, spelled


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_as_the_same_layers(model: Family, path: Path, spelling: str) -> None:
    meant = tiny.random_lora(attention(model), 2, seed=0)
    assert len(meant) >= 12
    assert_same_bits(read(model, path, spelled(meant, model.component, spelling)), meant)


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name not in ("processor", "cog_sdxl")])
def test_every_linear_of_the_denoiser_can_be_named(model: Family, path: Path, spelling: str) -> None:
    meant = tiny.random_lora(tiny.linear_shapes(model.denoiser), 1, seed=0)
    assert_same_bits(read(model, path, spelled(meant, model.component, spelling)), meant)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_any_floating_point_file_is_read_without_loss(model: Family, path: Path, dtype: torch.dtype) -> None:
    drawn = tiny.random_lora(attention(model), 2, seed=0)
    meant = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in drawn.items()}
    seen = read(model, path, spelled(meant, model.component, "diffusers"))
    for name, factors in meant.items():
        assert torch.equal(seen[name].A.double(), factors[0].double()), name
        assert torch.equal(seen[name].B.double(), factors[1].double()), name


def test_layers_come_in_the_inventorys_order_not_the_files(path: Path) -> None:
    order = ["c", "a", "d", "b"]
    save_file({key: x for name in sorted(order) for key, x in keyed(name, pair(4, 5)).items()}, path)
    assert list(read_lora(path, {"unet": dict.fromkeys(order, (4, 5))}, dict, {})) == order
