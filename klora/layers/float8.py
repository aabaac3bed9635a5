"""Products in float8 (e4m3, 4 significant bits, with a scale), which tensor cores multiply twice as fast as bf16.

A LoRA is added before the weight is rounded: W + B A, always of the pristine W. A weak one is not lost in the rounding:
few elements move to another float8 number, but those move by many times the update, and products sum over thousands.
I inputs, O outputs, R rank, L layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from klora.layers.loans import InPlaceOf
from klora.layers.pairs import Pairs

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST = 1e-12  # magnitude from which a row's scale is taken, for a row of zeros


class Float8Linear(InPlaceOf):
    """base(x), with the weight and x in float8; each row of x is scaled by its own largest magnitude. Accumulates as
    tensor cores do at their fastest, in less than float32. On GPUs since Ada, and slowly on a CPU.

    quantized: float8 [O, I], both multiples of 16; scale: float32 [O], by row, W being scale * quantized. Their values
    may change between calls.
    """

    def __init__(self, base: nn.Linear, quantized: Tensor, scale: Tensor) -> None:
        super().__init__(base)
        # Parameters, of which torch knows when it compiles that their sizes stay as they are.
        self.quantized, self.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (quantized, scale))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST
        # Not F.scaled_mm, of which torch 2.11's compiler knows nothing.
        y: Tensor = torch._scaled_mm(
            (rows / scale).to(FLOAT8), self.quantized.t(), scale, self.scale[None], self.base.bias,
            out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)


def takes_float8(linear: nn.Linear) -> bool:
    """Whether both sides of its weight are multiples of 16, as GPUs' float8 products need them."""
    return linear.in_features % 16 == 0 and linear.out_features % 16 == 0


def scales_of(layers: Mapping[int, tuple[Tensor, Pairs]], gates: Tensor) -> dict[int, Tensor]:
    """{index: float32 [O], one number repeated}: a layer's weight divided by it stays within float8's range, whatever
    acts there. layers: {index: (weight, pairs)}; gates: the largest |gate| of each LoRA, [all layers, LoRAs].

    The bound is |W + dW| <= max|W| + sum of |gate| R max|B| max|A|: several times too large, which costs no precision,
    as float8 is floating point. The scale is a power of two, so that an untouched weight is rounded the same whatever
    LoRAs and scales there are.
    """
    if not layers:
        return {}
    outputs = [len(weight) for weight, _ in layers.values()]
    bounds = _bounds(layers, gates)
    _, exponents = torch.frexp(bounds / LARGEST)
    scales, counts = torch.ldexp(torch.ones_like(bounds), exponents), _beside(bounds, torch.tensor(outputs))
    rows = scales.repeat_interleave(counts, output_size=sum(outputs))
    return dict(zip(layers, rows.split(outputs), strict=True))


def _bounds(layers: Mapping[int, tuple[Tensor, Pairs]], gates: Tensor) -> Tensor:
    """An upper bound of |W + dW| for each layer, float32 [L]."""
    largest = _largest([weight.detach() for weight, _ in layers.values()])
    acting = [
        (row, pair, gate)
        for row, (index, (_, pairs)) in enumerate(layers.items())
        for pair, gate in zip(pairs, gates[index].tolist(), strict=True)
        if pair is not None and gate
    ]
    if not acting:
        return largest
    rows, pairs, factors = zip(*acting, strict=True)
    updates = _largest([pair.A for pair in pairs]) * _largest([pair.B for pair in pairs])
    ranked = torch.tensor([pair.rank * gate for pair, gate in zip(pairs, factors, strict=True)])
    return largest.index_add(0, _beside(largest, torch.tensor(rows)), updates * _beside(largest, ranked))


def _beside(other: Tensor, tensor: Tensor) -> Tensor:
    """A CPU tensor copied to the other's device, without waiting for that."""
    return tensor.to(other.device, non_blocking=True)


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in each tensor, float32 [len(tensors)], in a launch or two."""
    return torch.stack(torch._foreach_norm(tensors, torch.inf)).float()
