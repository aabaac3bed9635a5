"""What torch has no one kernel for, on a CUDA GPU, in Triton, which comes with torch for CUDA on Linux: klora.device's
has_triton() says whether this file can be imported. Knows no module and no file.

Merges   W + sum of g B A of many layers at a launch: each weight is read once and written once; addmm copies it first.
rotated  queries or keys turned by their places: diffusers' very bits, in one pass over them where it takes a dozen.

Nothing is compiled anew for another rank, another number of tokens or another number of layers.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
import triton
import triton.language as tl
from torch import Tensor

from klora.lora import GatedPairs, readable

TILE = {"TALL": 32, "WIDE": 128, "SPAN": 8, "DEEP": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 96}
"""Of _merge: rows of a program, columns that it has at a time, how often, how much of the rank at a time. The fastest
of some twenty on an H200, where it moves 3.7 TB/s at ranks up to 16, and torch's copy_() 3.2."""
FIRST, AT_ONCE = 8, 64  # layers, and twice as many each time: a GPU writes them while the host looks up the next

Kind = tuple[torch.Size, torch.dtype, torch.dtype, int]
"""What layers have to have in common to be written at one launch: shape, dtype, out's dtype, how many LoRAs act."""


@dataclass(frozen=True)
class Merges:
    """out = W + sum of gate * B A, of any of these layers, rounded once, from float32.

    weights, outs: a layer's W and out [O, I] each, outs as torch makes them. scales: {index of a layer: float32 [O]}
    where out is of another dtype, to be multiplied with its rows, all the same. All that is read or written is on one
    GPU, a layer's but for that of one dtype.
    """

    weights: Sequence[Tensor]
    outs: Sequence[Tensor] | Mapping[int, Tensor]
    scales: Mapping[int, Tensor] = field(default_factory=dict)

    def __call__(self, layers: Iterable[tuple[int, GatedPairs]]) -> None:
        """Write the layers of these indices. FIRST are asked for before the first launch, and no more than AT_ONCE
        before another."""
        rest, count = iter(layers), FIRST
        while some := list(islice(rest, count)):
            self._write(some)
            count = min(2 * count, AT_ONCE)

    def _write(self, layers: Sequence[tuple[int, GatedPairs]]) -> None:
        """Those of one kind at one launch."""
        kinds: dict[Kind, tuple[Tensor, Tensor, list[int], list[float]]] = {}
        read: list[Tensor] = []  # copies, too, which last until the kernels are launched
        for index, acting in layers:
            weight, out, scale = self.weights[index], self.outs[index], self.scales.get(index)
            kind = (out.shape, weight.dtype, out.dtype, len(acting))
            *_, addresses, gates = kinds.setdefault(kind, (weight, out, [], []))
            read.append(readable(weight))
            addresses += (read[-1].data_ptr(), out.data_ptr(), 0 if scale is None else scale.data_ptr())
            for pair, gate in acting:
                lora_A, lora_B = pair.readable
                addresses += (lora_A.data_ptr(), lora_B.data_ptr(), pair.rank)
                gates.append(gate)
        for (*_, loras), (like, target, addresses, gates) in kinds.items():
            # An array, because torch.tensor() looks at each number.
            tables = torch.frombuffer(array("q", addresses), dtype=torch.int64), torch.tensor(gates)
            there = (table.to(like.device, non_blocking=True) for table in tables)
            grid, facts = (*_strips(like), len(addresses) // (3 + 3 * loras)), (loras, target.dtype != like.dtype)
            with torch.cuda.device_of(like):  # Triton launches on the current one
                _merge[grid](*there, like, target, *like.shape, *facts, **TILE)


def _strips(matrix: Tensor) -> tuple[int, int]:
    """How many of them it has, downwards and across."""
    return triton.cdiv(matrix.shape[0], TILE["TALL"]), triton.cdiv(matrix.shape[1], TILE["WIDE"] * TILE["SPAN"])


@triton.jit(do_not_specialize=["addresses", "gates", "outputs"])
def _merge(  # no types: triton reads annotations
    addresses,
    gates,
    like,
    target,
    outputs,
    inputs,
    LORAS: tl.constexpr,
    SCALED: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    SPAN: tl.constexpr,
    DEEP: tl.constexpr,
):
    top, left = tl.program_id(0) * TALL, tl.program_id(1) * (SPAN * WIDE)
    row, column, r = tl.arange(0, TALL)[:, None], tl.arange(0, WIDE)[None, :], tl.arange(0, DEEP)
    layer, corner = addresses + tl.program_id(2) * (3 + 3 * LORAS), top.to(tl.int64) * inputs + left
    weight = tl.multiple_of(tl.load(layer).to(like.dtype), 16) + corner
    out = tl.multiple_of(tl.load(layer + 1).to(target.dtype), 16) + corner
    below = row < outputs - top
    ahead = tl.load(weight + row * inputs + column, mask=below & (column < inputs - left))
    for _ in range(SPAN):
        value, inside = ahead.to(tl.float32), column < inputs - left
        weight += WIDE  # what comes next is on its way while this is computed
        ahead = tl.load(weight + row * inputs + column, mask=below & (column < inputs - left - WIDE))
        for lora in tl.static_range(LORAS):
            gate = tl.load(gates + tl.program_id(2) * LORAS + lora)
            lora_A = tl.multiple_of(tl.load(layer + 3 + 3 * lora).to(like.dtype), 16) + left
            rank = tl.load(layer + 5 + 3 * lora).to(tl.int32)
            lora_B = tl.load(layer + 4 + 3 * lora).to(like.dtype) + top * rank
            for start in range(0, rank, DEEP):
                B = tl.load(lora_B + row * rank + r[None, :], mask=below & (r[None, :] < rank - start), other=0.0)
                A = tl.load(lora_A + r[:, None] * inputs + column, mask=(r[:, None] < rank - start) & inside, other=0.0)
                value += gate * tl.dot(B, A, input_precision="ieee")
                lora_A += DEEP * inputs
                lora_B += DEEP
        if SCALED:
            value /= tl.load(tl.load(layer + 2).to(tl.pointer_type(tl.float32)))
        tl.store(out + row * inputs + column, value.to(target.dtype.element_ty), mask=below & inside)
        out += WIDE
        left += WIDE


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours in the last dimension, as complex numbers, turned by their place's angles (RoPE, arXiv:2104.09864).

    x [N, T, H, D], on a GPU; cos, sin: float32 [T, D], each angle's twice. Computed in float32, product by product.
    """
    x = x.contiguous()
    count, tokens, heads, width = x.shape
    out = torch.empty_like(x)
    sides = {"HEADS": triton.next_power_of_2(heads), "WIDTH": triton.next_power_of_2(width)}
    with torch.cuda.device_of(x):  # products that were fused with their sum would be rounded otherwise than torch's
        _rotate[(count * tokens,)](x, cos, sin, out, tokens, heads, width, **sides, enable_fp_fusion=False)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _rotate(x, cos, sin, out, tokens, heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0)
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    at, inside = (token.to(tl.int64) * heads + head) * width + place, (head < heads) & (place < width)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(value, (HEADS, WIDTH // 2, 2)))
    turned = tl.reshape(tl.join(-imaginary, real), (HEADS, WIDTH))
    angle = token % tokens * width + place
    cosine = tl.load(cos + angle, mask=place < width, other=0.0)
    sine = tl.load(sin + angle, mask=place < width, other=0.0)
    tl.store(out + at, (value * cosine + turned * sine).to(out.dtype.element_ty), mask=inside)
