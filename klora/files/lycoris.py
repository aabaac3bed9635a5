"""LyCORIS' ways to write an update, and whole weight differences -> low-rank pairs: exact ones where MAX_RANK allows,
else the nearest, whose error is told.   O outputs, I inputs, R rank.

    LoHa   dW = (w1_a w1_b) * (w2_a w2_b)     FedPara, arXiv:2108.06098
    LoKr   dW = w1 (x) w2                     LyCORIS, arXiv:2309.14859
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from klora.lora import LowRank

Factors = tuple[Tensor, Tensor]  # A [R, I], B [O, R], float64

MAX_RANK = 512
MAX_ERROR = 0.01  # of dW's Frobenius norm; above it a file is refused
MAX_DENSE = 1 << 27  # elements to factorise for one file, at most: minutes on two cores


def low_rank(kind: str, parts: Mapping[str, Tensor], scale: float) -> tuple[LowRank, float]:
    """A pair for one layer, float32, and its error relative to dW, 0 where it is exact. kind: LoHa, LoKr or diff;
    parts: by their name in the file; scale: alpha / rank."""
    parts = {name: tensor.double() for name, tensor in parts.items()}
    (A, B), error = _nearest(parts["diff"]) if kind == "diff" else {"LoHa": _loha, "LoKr": _lokr}[kind](parts)
    return LowRank(A.float(), (B * scale).float()), error


def _loha(parts: Mapping[str, Tensor]) -> tuple[Factors, float]:
    """The rows of A are products of each row of w1_b with each of w2_b; so are B's columns. Exact where the ranks'
    product is at most MAX_RANK."""
    a1, b1, a2, b2 = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if len(b1) * len(b2) <= MAX_RANK:
        A = (b1[:, None] * b2).flatten(0, 1)
        return (A, (a1[:, :, None] * a2[:, None]).flatten(1)), 0.0
    return _nearest((a1 @ b1) * (a2 @ b2))


def _lokr(parts: Mapping[str, Tensor]) -> tuple[Factors, float]:
    """The singular vectors and values of a Kronecker product are the products of its factors' own."""
    (U1, s1, V1), (U2, s2, V2) = (_decomposed(parts, f"lokr_{name}") for name in ("w1", "w2"))
    products = torch.outer(s1, s2).flatten()
    largest = products.argsort(descending=True)[: min(MAX_RANK, max(1, int(products.count_nonzero())))]
    i, j = largest // len(s2), largest % len(s2)
    A = (V1[i][:, :, None] * V2[j][:, None]).flatten(1)
    B = (U1[:, i][:, None] * U2[:, j]).flatten(0, 1) * products[largest]
    return (A, B), _lost(products.square().sum(), products[largest].square().sum())


def _nearest(matrix: Tensor) -> tuple[Factors, float]:
    """The nearest pair of at most MAX_RANK, by a randomised decomposition (arXiv:0909.4061). With a generator of its
    own, which torch.svd_lowrank does not take, so that a file is read alike every time."""
    generator = torch.Generator().manual_seed(0)
    Q = matrix @ torch.randn(matrix.shape[1], min(MAX_RANK, *matrix.shape), generator=generator, dtype=matrix.dtype)
    for _ in range(2):
        Q = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(Q).Q).Q
    Q = torch.linalg.qr(Q).Q
    U, s, V = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    kept = max(1, int((s > s[0] * 1e-7).sum()))
    return (V[:kept], Q @ U[:, :kept] * s[:kept]), _lost(matrix.square().sum(), s[:kept].square().sum())


def _decomposed(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V) of the factor called name, or of NAME_a NAME_b, whose product is never formed."""
    if name in parts:
        U, s, V = torch.linalg.svd(parts[name], full_matrices=False)
    else:
        (Qa, Ra), (Qb, Rb) = torch.linalg.qr(parts[f"{name}_a"]), torch.linalg.qr(parts[f"{name}_b"].T)
        U, s, V = torch.linalg.svd(Ra @ Rb.T, full_matrices=False)
        U, V = Qa @ U, V @ Qb.T
    return U, torch.where(s > s[0] * 1e-12, s, 0), V


def _lost(whole: Tensor, kept: Tensor) -> float:
    """The relative error of an approximation. whole, kept: squared Frobenius norms, of dW and of the approximation."""
    return float(((whole - kept).clamp(min=0) / whole.clamp(min=1e-30)).sqrt())
