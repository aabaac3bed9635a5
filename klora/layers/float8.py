"""Products in float8: e4m3, of four bits' precision, over a scale, which tensor cores multiply twice as fast as bf16.

A LoRA is in the weight before that is rounded: W + B A, always of the pristine W. A weak one is not lost: it carries an
element over to the next number of float8 seldom, but then by many times itself, and products are sums of thousands.
I inputs, O outputs, R rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from klora.layers.loans import InPlaceOf
from klora.layers.pairs import Pairs

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST = 1e-12  # of a scale: of what is nothing but zeros


class Float8Linear(InPlaceOf):
    """base(x), but by a weight in float8, and with x, each of its rows over its largest magnitude, in float8 as well;
    summed in as many bits as tensor cores have for it at their fastest. On GPUs since Ada, and slowly on a CPU.

    quantized: float8 [O, I], both multiples of 16; scale: float32 [O], what its rows are to be multiplied with; their
    values may change between calls.
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
    """Whether a GPU multiplies by its weight in float8."""
    return linear.in_features % 16 == 0 and linear.out_features % 16 == 0


def scales_of(layers: Mapping[int, tuple[Tensor, Pairs]], gates: Tensor) -> dict[int, Tensor]:
    """{index: float32 [O], of its rows all the same} of layers' weights and pairs: over it, the weight is within
    float8's range whatever acts there. gates: the largest of each LoRA, [all layers, LoRAs].

    As |B A| <= R max|B| max|A|, which is several times too much and costs no precision, float8 being floating point.
    A power of two, so that what is not touched is rounded alike whatever LoRAs and scales there are.
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
    """What no element of a layer's weight exceeds, float32 [these layers]."""
    largest = _largest([weight.detach() for weight, _ in layers.values()])
    acting = [
        (place, pair, gate)
        for place, (index, (_, pairs)) in enumerate(layers.items())
        for pair, gate in zip(pairs, gates[index].tolist(), strict=True)
        if pair is not None and gate
    ]
    if not acting:
        return largest
    places, pairs, factors = zip(*acting, strict=True)
    updates = _largest([pair.A for pair in pairs]) * _largest([pair.B for pair in pairs])
    ranked = torch.tensor([pair.rank * gate for pair, gate in zip(pairs, factors, strict=True)])
    return largest.index_add(0, _beside(largest, torch.tensor(places)), updates * _beside(largest, ranked))


def _beside(other: Tensor, tensor: Tensor) -> Tensor:
    """On the other's device, without waiting for it."""
    return tensor.to(other.device, non_blocking=True)


def _largest(tensors: list[Tensor]) -> Tensor:
    """Magnitude of each, float32 [how many], in a launch or two."""
    return torch.stack(torch._foreach_norm(tensors, torch.inf)).float()
