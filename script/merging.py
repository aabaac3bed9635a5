"""W + gate B A in one kernel, which reads W once and writes once, where addmm copies W first and then adds to the copy:
two passes over memory in the place of four. Needs triton, which comes with torch for CUDA. Not yet in klora.layers:
script/bench_kernels is to show first that it pays.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128  # of W for each program


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, gate: float, out: Tensor) -> None:
    """out = weight + gate B A.  weight and out [O, I], A [R, I], B [O, R]: contiguous, of one dtype, on one GPU.

    Rounded once, from float32.
    """
    (outputs, inputs), rank = weight.shape, lora_A.shape[0]
    padded = max(16, triton.next_power_of_2(rank))  # what a tensor core multiplies at least
    grid = (triton.cdiv(outputs, ROWS), triton.cdiv(inputs, COLUMNS))
    _kernel[grid](weight, lora_A, lora_B, out, gate, outputs, inputs, rank, padded, ROWS, COLUMNS)


@triton.jit
def _kernel(  # no Any: triton reads the annotations
    weight,
    lora_A,
    lora_B,
    out,
    gate,
    outputs,
    inputs,
    rank,
    PADDED: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)[:, None]
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    r = tl.arange(0, PADDED)
    B = tl.load(lora_B + row * rank + r[None, :], mask=(row < outputs) & (r[None, :] < rank), other=0.0)
    A = tl.load(lora_A + r[:, None] * inputs + column, mask=(r[:, None] < rank) & (column < inputs), other=0.0)
    place, inside = row.to(tl.int64) * inputs + column, (row < outputs) & (column < inputs)
    merged = tl.load(weight + place, mask=inside) + gate * tl.dot(B, A, input_precision="ieee")
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside)
