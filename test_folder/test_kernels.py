"""Kernels of our own, against torch in float64. Skipped where there is no CUDA GPU, unless triton is there and its
interpreter is asked for by TRITON_INTERPRET=1, which has no bfloat16."""

import os

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from klora.layers.engines import _gated_pairs
from klora.lora import GatedPairs, LowRank

CUDA = torch.cuda.is_available()
if not CUDA and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
kernels = pytest.importorskip("klora.kernels")
Merges, rotated = kernels.Merges, kernels.rotated

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
LAYERS = [(64, 128, 8, 3), (70, 130, 3, 0), (200, 333, 24, 1), (64, 128, 0, 40), (64, 128, 8, 3), (40, 1300, 17, 16)]
"""outputs, inputs, the rank of each LoRA, 0 where it has none"""
GATES = torch.tensor([[0.7, 0], [0.3, 0.5], [0, 0], [1, 2], [-1, 1], [0.5, 0.5]], dtype=torch.float64)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def changes(pairs: list[list[LowRank | None]], gates: torch.Tensor) -> list[tuple[int, GatedPairs]]:
    """Of every layer. gates [layers, LoRAs]"""
    return [(index, _gated_pairs(own, row)) for index, (own, row) in enumerate(zip(pairs, gates.tolist(), strict=True))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_merges_are_each_the_sum_rounded_once_and_no_other_layer_is_written(dtype: torch.dtype) -> None:
    weights = [random(outputs, inputs, dtype=dtype) for outputs, inputs, *_ in LAYERS]
    pairs = [
        [LowRank(random(r, inputs, dtype=dtype), random(outputs, r, dtype=dtype)) if r else None for r in ranks]
        for outputs, inputs, *ranks in LAYERS
    ]
    outs = [torch.full_like(weight, torch.nan) for weight in weights]
    merges, acting = Merges(weights, outs), changes(pairs, GATES)
    merges(acting[index] for index in (4, 0, 2, 3, 5))
    assert outs[1].isnan().all()
    merges([acting[1]])
    for weight, own, out, gates in zip(weights, pairs, outs, GATES, strict=True):
        updates = [
            gate.item() * (pair.B.double() @ pair.A.double()) for gate, pair in zip(gates, own, strict=True) if pair
        ]
        exact = torch.stack([weight.double(), *updates]).sum(0)
        torch.testing.assert_close(out.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)


def test_merges_into_float8_are_rounded_over_their_scales_beside_those_that_are_not() -> None:
    """Triton's interpreter rounds ties away from zero, and loses the carry into the exponent: one number in fifty."""
    dtype = DTYPES[-1]
    weights = [random(outputs, inputs, dtype=dtype) for outputs, inputs, *_ in LAYERS]
    pairs: list[list[LowRank | None]] = [
        [LowRank(random(r, inputs, dtype=dtype), random(outputs, r, dtype=dtype)) if r else None for r in ranks]
        for outputs, inputs, *ranks in LAYERS
    ]
    scales = {
        index: torch.full((len(weights[index]),), 2.0**power, device=DEVICE)
        for index, power in ((0, 0), (3, -1), (5, 2))
    }
    outs = [
        torch.zeros_like(weight, dtype=torch.float8_e4m3fn if index in scales else None)
        for index, weight in enumerate(weights)
    ]
    acting = changes(pairs, GATES)
    Merges(weights, outs, scales)(acting)
    for index, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        exact = sum((gate * (pair.B.double() @ pair.A.double()) for pair, gate in acting[index][1]), weight.double())
        if index not in scales:
            torch.testing.assert_close(out.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)
            continue
        expected = (exact / scales[index][:, None]).float().to(torch.float8_e4m3fn)
        assert (out.float() != expected.float()).double().mean() < (1e-3 if CUDA else 0.05)


def test_gates_of_zero_copy_the_weight_bit_for_bit_whatever_the_loras_hold() -> None:
    weight, out = random(64, 128, dtype=torch.float16), random(64, 128, dtype=torch.float16)
    infinite = (
        torch.full((8, 128), torch.inf, device=DEVICE).half(),
        torch.full((64, 8), torch.inf, device=DEVICE).half(),
    )
    Merges([weight], [out])(changes([[LowRank(*infinite)]], torch.zeros(1, 1)))
    assert torch.equal(out, weight)


def test_factors_that_lie_askew_are_read_rightly() -> None:
    stored = random(3 * 130 + 1, dtype=torch.float32)
    lora_A, lora_B = stored[1:].view(130, 3).T, random(70, 6, dtype=torch.float32)[:, ::2]
    weight, out = random(70, 130, dtype=torch.float32), torch.empty(70, 130, device=DEVICE)
    Merges([weight], [out])([(0, [(LowRank(lora_A, lora_B), 1.0)])])
    torch.testing.assert_close(out, weight + lora_B @ lora_A, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not CUDA, reason="the interpreter compiles nothing")
def test_no_lora_waits_for_a_compiler_once_two_one_and_none_have_acted() -> None:
    def merged(outputs: int, inputs: int, ranks: list[int], layers: int) -> None:
        weights = [random(outputs, inputs, dtype=torch.bfloat16) for _ in range(layers)]
        pair = [
            LowRank(random(r, inputs, dtype=weights[0].dtype), random(outputs, r, dtype=weights[0].dtype))
            for r in ranks
        ]
        gates = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]] * layers)[:layers]
        Merges(weights, [torch.empty_like(weight) for weight in weights])(changes([pair] * layers, gates))

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernels._merge.device_caches.values())

    merged(320, 64, [1, 1], 3)
    before = compiled()
    for outputs, inputs, ranks, layers in [(1280, 5120, [8, 16], 7), (333, 2816, [1, 17], 300), (64, 16, [128, 3], 5)]:
        merged(outputs, inputs, ranks, layers)
    assert compiled() == before > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("images", "tokens", "heads", "width"), [(2, 5, 3, 16), (1, 7, 24, 128), (1, 3, 2, 12)])
def test_a_rotation_has_the_bits_of_diffusers(
    images: int, tokens: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    x = random(images, tokens, heads, width, dtype=dtype)
    angles = random(tokens, width // 2, dtype=torch.float32).repeat_interleave(2, dim=1)
    turns = angles.cos(), angles.sin()
    assert torch.equal(rotated(x, *turns), apply_rotary_emb(x, turns, sequence_dim=1))
