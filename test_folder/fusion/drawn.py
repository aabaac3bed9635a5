"""Random LoRAs, fusions whose ratios are given, and what a naive computation makes of them."""

import torch

from klora.fusion import Fusion, importance
from klora.lora import LowRank
from test_folder import tiny

SCHEDULES = [("s", 1.5, 0.5), ("s*", 1.5, 1.275)]


def random_pair(rows, columns, rank, seed=0):
    return LowRank(*tiny.random_lora({"layer": (rows, columns)}, rank, seed=seed)["layer"])


def random_pairs(layers, rank, seed, spread=0.0):
    """{name: LowRank} of `layers` layers of three shapes; spread: of the logarithm of a layer's magnitude."""
    shapes = {f"block.{index}": [(12, 8), (8, 16), (10, 10)][index % 3] for index in range(layers)}
    factors = torch.exp(spread * torch.randn(layers, generator=torch.Generator().manual_seed(seed)))
    drawn = tiny.random_lora(shapes, rank, seed=seed)
    return {name: LowRank(A, B * factor) for (name, (A, B)), factor in zip(drawn.items(), factors, strict=True)}


def dense_magnitudes(pair):
    """|B A| as a float64 vector, computed all at once."""
    return (pair.B.double() @ pair.A.double()).abs().flatten()


def top_and_l1(pair, k):
    """The subject's (sum of the k largest |dW|, sum of all)."""
    return importance([pair], [k, pair.numel])[0]


def full_sort(pair, k):
    """(sum of the k largest |dW|, sum of all)."""
    magnitudes = dense_magnitudes(pair).sort(descending=True).values
    return torch.stack([magnitudes[:k].sum(), magnitudes.sum()])


def with_ratios(ratios, style_score=1.0, gamma=1.0):
    """A Fusion whose R is given."""
    style = torch.full((len(ratios),), style_score, dtype=torch.float64)
    content = torch.as_tensor(ratios, dtype=torch.float64) * style * gamma
    names, gammas = tuple(f"layer.{index}" for index in range(len(ratios))), {"reference": gamma, "paper": gamma}
    return Fusion(names, {}, {}, content, style, gamma, gammas)


def flips(wins):
    """How often each layer changes hands: [L]."""
    return (wins[1:] != wins[:-1]).sum(0)


def naive_sums(content, style):
    """[(content's top-K sum, style's, content's L1, style's)] of each layer, in float64."""
    sums = []
    for name, pair in content.items():
        (content_sum, content_l1), (style_sum, style_l1) = (
            full_sort(lora, pair.rank * style[name].rank).numpy() for lora in (pair, style[name])
        )
        sums.append((content_sum, style_sum, content_l1, style_l1))
    return sums


def naive_gamma(sums):
    ratios = [content_l1 / style_l1 for _, _, content_l1, style_l1 in sums]
    mean = sum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < 3 * mean]
    return sum(kept) / len(kept)


def some_ratios():
    """R from well below the smallest scale to well above the largest."""
    return torch.exp(torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def midpoints(steps):
    return torch.tensor([(step + 0.5) / steps for step in range(steps)], dtype=torch.float64)
