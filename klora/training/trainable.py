"""Adds a LoRA's layers to a module so that gradients reach their factors. Knows no loss and no data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.layers import LoRALinear, lend_linear, lending
from klora.lora import LowRank


class TrainableLinear(LoRALinear):
    """base(x) + gate B A x, for training: gradients reach lora_A and lora_B, which may be float32.

    gate []: one for many layers, 0 for the base alone.
    """

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> None:
        super().__init__(base, lora_A, lora_B)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.lora_A.to(x.dtype)) * self.gate
        return self.base(x) + F.linear(hidden, self.lora_B.to(x.dtype))


@contextmanager
def trainable(denoiser: nn.Module, layers: Mapping[str, LowRank]) -> Iterator[Tensor]:
    """Lend low-rank pairs to a module for the block, not copied, so that gradients reach their A and B.

    layers: {module name: pair}, A and B nn.Parameters on the module's device, in any float dtype. Yields the gate of
    all layers, [], at 1; at 0 the module computes as the base. Raises LoRAError for a name that is no linear of it.
    """
    gate = torch.ones((), device=next((pair.A.device for pair in layers.values()), None))
    with lending() as loans:
        for name, pair in layers.items():
            lend_linear(loans, denoiser, name, partial(TrainableLinear, lora_A=pair.A, lora_B=pair.B, gate=gate))
        yield gate
