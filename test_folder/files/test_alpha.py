"""An alpha beside the factors is folded into them exactly."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import CLIP_Q, FLUX_Q, KOHYA_Q, Q, assert_same_delta, delta, denoiser_layer, pair, read
from test_folder.files.spelling import KOHYA, LEGACY, PEFT, Endings, keyed, sgm


@pytest.mark.parametrize("foreign", [False, True], ids=["diffusers names", "sgm names"])
def test_mixed_alphas_and_ranks_are_folded_exactly(sdxl: Family, path: Path, foreign: bool) -> None:
    tensors, meant = {}, {}
    for seed, (name, shape) in enumerate(tiny.linear_shapes(sdxl.denoiser).items()):
        factors, alpha = pair(*shape, rank=1 + seed % 5, seed=seed), [None, 1.0, 0.3, 16.0][seed % 4]
        stem = f"lora_unet_{(sgm(name) if foreign else name).replace('.', '_')}"
        tensors |= keyed(stem, factors, KOHYA) | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)})
        meant[name] = delta(factors, alpha)
    seen = read(sdxl, path, tensors)
    assert seen.keys() == meant.keys()
    for name in meant:
        assert_same_delta(seen[name], meant[name])


@pytest.mark.parametrize("endings", [PEFT, KOHYA, LEGACY], ids=["peft", "kohya", "legacy"])
def test_alpha_is_read_beside_any_spelling(flux: Family, path: Path, endings: Endings) -> None:
    stem, factors = f"transformer.{FLUX_Q}", pair(64, 64, rank=3)
    seen = read(flux, path, keyed(stem, factors, endings) | {f"{stem}.alpha": torch.tensor(2.0)})
    assert_same_delta(seen[FLUX_Q], delta(factors, 2.0))


def test_text_encoders_alpha_is_folded_too(sdxl: Family, path: Path) -> None:
    stem, factors = f"lora_te2_{CLIP_Q}", pair(32, 32, rank=3)
    seen = read(sdxl, path, denoiser_layer("sdxl") | keyed(stem, factors, KOHYA) | {f"{stem}.alpha": torch.tensor(2.0)})
    (layer,) = seen.text_encoders["text_encoder_2"].values()
    assert_same_delta(layer, delta(factors, 2.0))


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(3.0, dtype=torch.float16),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([3.0]),
    ],
    ids=["fp16", "bf16", "fp64", "int64", "vector of one"],
)
def test_alpha_may_be_a_number_of_any_dtype(sdxl: Family, path: Path, alpha: Tensor) -> None:
    factors = pair(32, 32, rank=2)
    seen = read(sdxl, path, keyed(KOHYA_Q, factors, KOHYA) | {f"{KOHYA_Q}.alpha": alpha})
    assert_same_delta(seen[Q], delta(factors, 3.0))


def test_alpha_of_a_half_precision_file_is_folded_without_rounding_to_half(sdxl: Family, path: Path) -> None:
    A, B = (factor.half() for factor in pair(32, 32, rank=3))
    seen = read(sdxl, path, keyed(KOHYA_Q, (A, B), KOHYA) | {f"{KOHYA_Q}.alpha": torch.tensor(0.1)})
    assert_same_delta(seen[Q], delta((A, B), 0.1))
