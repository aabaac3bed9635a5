"""Whose LoRA a file is: exactly one family recognises its keys, or none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.models import FAMILIES, origin_of
from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import CLIP_Q
from test_folder.files.spelling import BFL, SPELLINGS, attention, sgm, spelled


def family_of(keys: list[str], path: Path) -> str | None:
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    origin = origin_of(path)
    return origin and origin.family


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_exactly_one_family_recognises_a_spelling(families: dict[str, Family], path: Path, spelling: str) -> None:
    for family, model in families.items():
        keys = list(spelled(tiny.random_lora(attention(model), 1, seed=0), model.component, spelling))
        assert [name for name, kind in FAMILIES.items() if kind.recognises(keys)] == [family]
        assert family_of(keys, path) == family


def test_foreign_spellings_are_recognised(families: dict[str, Family], path: Path) -> None:
    """By any one key of a denoiser's block."""
    modules = {"sdxl": [sgm(name) for name in attention(families["sdxl"])], "flux": [name.format(0) for name in BFL]}
    for family, names in modules.items():
        for name in names:
            assert family_of([f"lora_unet_{name.replace('.', '_')}.lora_down.weight"], path) == family
            assert family_of([f"diffusion_model.{name}.lora_A.weight"], path) == family


@pytest.mark.parametrize(
    "keys",
    [[], ["mystery.lora_A.weight"], [f"lora_te1_{CLIP_Q}.lora_down.weight"]],
    ids=["no keys", "nonsense", "text encoder alone"],
)
def test_keys_of_no_known_family_have_none(path: Path, keys: list[str]) -> None:
    assert family_of(keys, path) is None
