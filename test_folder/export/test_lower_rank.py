"""A lower rank is the truncated SVD of the dense matrix, and what it loses is told."""

import pytest
import torch
from torch import Tensor

from klora import Fusion, LoRA, LowRank
from klora.export import DTYPES, baked, errors, reduced, rounded
from test_folder.export.exporting import SHAPES, dense


@pytest.mark.parametrize("rank", [1, 3, 7, 100])
def test_a_lower_rank_is_the_truncated_svd_of_the_dense_matrix(fusion: Fusion, wins: Tensor, rank: int) -> None:
    exact = baked(fusion, wins)
    seen = reduced(exact, rank)
    for name, pair in exact.items():
        U, s, V = torch.linalg.svd(dense(pair), full_matrices=False)
        best = U[:, :rank] * s[:rank] @ V[:rank]
        assert (dense(seen[name]) - best).abs().max() < 1e-6 * s[0], name
        assert seen[name].rank == (min(rank, *SHAPES.get(name, (12, 20))) if pair.rank > rank else pair.rank)
        assert seen[name].A.dtype == seen[name].B.dtype == torch.float32
    assert all(pair.rank <= rank for pair in seen.text_encoders["text_encoder"].values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 100])
def test_errors_are_the_dense_norms(fusion: Fusion, wins: Tensor, rank: int, dtype: str) -> None:
    exact = baked(fusion, wins)
    kept = rounded(reduced(exact, rank), DTYPES[dtype])
    each, total = errors(exact, kept)
    texts = exact.text_encoders["text_encoder"], kept.text_encoders["text_encoder"]
    whole = {**exact, **{f"text_encoder.{name}": pair for name, pair in texts[0].items()}}
    kept_of = {**kept, **{f"text_encoder.{name}": pair for name, pair in texts[1].items()}}
    lost = {name: (dense(pair) - dense(kept_of[name])).norm() for name, pair in whole.items()}
    assert each == pytest.approx({name: float(lost[name] / dense(whole[name]).norm()) for name in whole}, abs=1e-12)
    norms = [
        torch.stack([*norms]).norm() for norms in (lost.values(), map(torch.linalg.norm, map(dense, whole.values())))
    ]
    assert total == pytest.approx(float(norms[0] / norms[1]), abs=1e-12)
    assert total > 0.05 if rank == 2 else total < 0.01


def test_a_layer_of_zeros_has_no_error() -> None:
    zero = LoRA({"x": LowRank(torch.ones(2, 4), torch.zeros(4, 2))})
    assert errors(zero, zero) == ({"x": 0.0}, 0.0)
