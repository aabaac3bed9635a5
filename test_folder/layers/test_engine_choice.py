"""Which engine is taken: merged where a copy of the weights fits and can be written, else gated."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora import layers as subject
from klora.errors import RequestError
from klora.layers import HEADROOM_BYTES, attached
from klora.layers.pairs import compute_dtype
from klora.lora import LoRA, Plan
from test_folder.layers.network import LAYERS, random_lora, switching_plan


class Quantized(nn.Linear):
    """A linear of int8 weights, as quantisation libraries make them: a subclass, its own forward."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.unit = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.unit).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.unit)


class Int8(Tensor):
    """A tensor of int8, as torchao puts it into torch's own linears and optimum-quanto between them: it says that it is
    float32, can little more than to be multiplied by, and what is written to it is lost."""

    @staticmethod
    def __new__(cls, elements, unit):
        return Tensor._make_wrapper_subclass(cls, elements.shape, dtype=torch.float32, device=elements.device)

    def __init__(self, elements, unit):
        self.elements, self.unit = elements, unit

    @classmethod
    def __torch_dispatch__(cls, call, types, arguments=(), options=None):
        (weight,) = (part for part in arguments if isinstance(part, cls))
        if call in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            return cls(call(weight.elements, *arguments[1:]), weight.unit)
        if call._schema.name.removeprefix("aten::") not in ("t", "linear", "addmm", "addmm_"):
            raise NotImplementedError(f"{call} of {cls.__name__}")
        return call(*(part.elements * part.unit if part is weight else part for part in arguments), **(options or {}))


def of_int8_tensors(linear):
    """The linear with such a weight."""
    quantized = Quantized(linear)
    linear.weight = nn.Parameter(Int8(quantized.weight, quantized.unit), requires_grad=False)
    return linear


class Requantized(Quantized):
    """It quantises what it gives, too."""

    def forward(self, x):
        y = super().forward(x)
        unit = y.abs().max() / 127
        return Int8((y / unit).round().to(torch.int8), unit)


class Renamed(nn.Linear):
    """A linear whose weights may not be what its forward multiplies by."""


def weight_bytes(model):
    return sum(model.get_submodule(name).weight.nbytes for name in LAYERS)


@pytest.mark.parametrize(("spare", "engine"), [(0, "merged"), (-1, "gated")])
def test_engine_is_merged_where_a_copy_of_the_touched_weights_fits(monkeypatch, network, spare, engine):
    network.bfloat16()  # as bases are: the narrowest that can be written
    free = weight_bytes(network) + HEADROOM_BYTES + spare
    monkeypatch.setattr(subject, "free_bytes", lambda device: free)
    with attached(network, switching_plan(network)) as gate:
        assert gate.engine == engine


@pytest.mark.parametrize(("spare", "engine"), [(0, "merged"), (-1, "gated")])
def test_images_beyond_a_megapixel_leave_as_much_less_for_the_merged_engine(monkeypatch, network, spare, engine):
    free = weight_bytes(network) + 4 * HEADROOM_BYTES + spare
    monkeypatch.setattr(subject, "free_bytes", lambda device: free)
    with attached(network, switching_plan(network), pixels=2048 * 2048) as gate:
        assert gate.engine == engine
    assert subject.headroom_bytes(64 * 64) == HEADROOM_BYTES


def test_an_engine_that_there_is_not_is_refused_and_nothing_is_lent(network):
    before = list(network.modules())
    with (
        pytest.raises(RequestError, match=r"^engine is 'merge'\. Expected 'gated', 'merged' or None, for the one that"),
        attached(network, switching_plan(network), engine="merge"),
    ):
        pytest.fail("it was lent")
    assert list(network.modules()) == before


@pytest.mark.parametrize(
    "layer",
    [
        Quantized(nn.Linear(6, 8)),
        Renamed(6, 8, bias=False),
        nn.Linear(6, 8, bias=False).to(torch.float8_e4m3fn),
        of_int8_tensors(nn.Linear(6, 8, bias=False)),
    ],
    ids=["int8", "subclass", "float8", "int8 tensor"],
)
def test_engine_is_gated_for_weights_that_cannot_be_written(monkeypatch, network, layer):
    monkeypatch.setattr(subject, "free_bytes", lambda device: 1 << 60)
    network.to_q = layer
    with attached(network, switching_plan(network)) as gate:
        assert gate.engine == "gated"
    with pytest.raises(RequestError, match=r"^engine is .merged., but the base is quantised"):
        attached(network, switching_plan(network), engine="merged").__enter__()
    assert network.to_q is layer


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.int32], ids=str)
def test_beside_quantised_weights_a_lora_is_bfloat16_and_beside_others_of_their_dtype(stored):
    assert compute_dtype(stored) == torch.bfloat16
    assert compute_dtype(torch.float16) == torch.float16


@pytest.mark.parametrize("said", [torch.float16, torch.float8_e4m3fn, None], ids=str)
def test_beside_quantised_weights_a_lora_is_of_the_dtype_that_its_base_says_and_that_products_are_made_in(
    network, said
):
    network.to_q = Quantized(network.to_q)
    if said:
        network.dtype = said
    with attached(network, switching_plan(network)):
        assert network.to_q.lora_A.dtype == (torch.float16 if said is torch.float16 else torch.bfloat16)


@pytest.mark.parametrize("quantized", [Quantized, of_int8_tensors])
def test_lora_acts_on_int8_weights(network, x, quantized):
    network.to_q = quantized(network.to_q)
    lora = random_lora(network, ["to_q"], 2, seed=1)
    expected = network.to_q(x) + F.linear(x, lora["to_q"].B @ lora["to_q"].A)
    with attached(network, Plan.constant((lora,), (1.0,)), alike=LAYERS):
        # 2 in 100: the factors are bfloat16 there, 2**-9 each
        torch.testing.assert_close(network.to_q(x), expected, rtol=0.02, atol=0.02)


def test_lora_acts_on_what_a_layer_gives_as_a_quantisers_own_tensor(network, x):
    network.to_q = Requantized(network.to_q)
    lora, given = random_lora(network, ["to_q"], 2, seed=1), network.to_q(x)
    expected = given.elements * given.unit + F.linear(x, lora["to_q"].B @ lora["to_q"].A)
    with attached(network, Plan.constant((lora,), (1.0,))):
        torch.testing.assert_close(network.to_q(x), expected, rtol=0.02, atol=0.02)


def test_lora_that_has_been_placed_is_lent_as_it_lies(network, x):
    lora = LoRA(random_lora(network, ["to_q"], 2, seed=1))
    network.double()
    expected = network.to_q(x.double())
    lora.placed(x.device, torch.float64)["to_q"].B.zero_()  # which shows that nothing is placed anew
    with attached(network, Plan.constant((lora,), (1.0,))):
        torch.testing.assert_close(network.to_q(x.double()), expected)
