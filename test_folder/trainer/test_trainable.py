"""A layer that is trained is W x + b + gate B A x, its gradients are that sum's, and it is given back."""

import pytest
import torch
from torch import nn

from klora.errors import LoRAError
from klora.lora import LowRank
from klora.training.trainable import trainable


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


@pytest.mark.parametrize("opening", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)], ids=str)
def test_a_trained_layer_adds_gate_times_its_product(opening: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).requires_grad_(False), torch.randn(shape)
    base, pair = network[0], LowRank(drawn(3, 6), drawn(4, 3))
    twin = LowRank(*(factor.detach().clone().requires_grad_() for factor in (pair.A, pair.B)))
    expected = torch.tanh(x @ (base.weight + opening * twin.B @ twin.A).T + base.bias)
    expected.square().sum().backward()
    with trainable(network, {"0": pair}) as gate:
        gate.fill_(opening)
        seen = network(x)
        seen.square().sum().backward()
    torch.testing.assert_close(seen, expected)
    for mine, its in ((pair.A, twin.A), (pair.B, twin.B)):
        torch.testing.assert_close(mine.grad, its.grad)
    assert network[0] is base and base.weight.grad is None


def test_a_layer_that_is_none_is_refused_and_the_others_come_back() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    base = network[0]
    with pytest.raises(LoRAError, match="'1' is no linear layer"), trainable(
        network, {"0": LowRank(drawn(3, 6), drawn(4, 3)), "1": LowRank(drawn(3, 4), drawn(4, 3))}
    ):  # fmt: skip
        pass
    assert network[0] is base
