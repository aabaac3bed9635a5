"""Products in float8: what is written, what comes out, that weak LoRAs still act and that all comes back."""

import pytest
import torch
from torch import nn

from klora import layers as subject
from klora.layers import HEADROOM_BYTES, LoRALinear, attached, takes_float8
from klora.layers.float8 import FLOAT8, LARGEST, Float8Linear
from klora.lora import LowRank, Plan
from test_folder.layers.network import photograph, random_lora

LAYERS = ("to_q", "mlp.0", "mlp.1")


@pytest.fixture
def model():
    """Of sizes that tensor cores take."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        to_q, mlp = nn.Linear(32, 48, bias=False), nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 32))
        return nn.ModuleDict({"to_q": to_q, "mlp": mlp, "own": nn.Linear(32, 16)}).eval()


def switching(model):
    """Layers change hands, or strength, or neither; content has the second for itself, and no LoRA the third."""
    content, style = random_lora(model, LAYERS[:2], 3, seed=1), random_lora(model, LAYERS[:1], 2, seed=2)
    gates = torch.tensor([[[0.7, 0.0], [0.7, 0.0]], [[0.0, 1.3], [0.7, 0.0]], [[0.7, 0.0], [0.2, 0.0]]])
    return Plan(LAYERS[:2], (content, style), gates)


def updated(model, plan, name, step):
    """W + dW, in float64."""
    weight, gates = model.get_submodule(name).weight.double(), dict(zip(plan.layers, plan.gates[step], strict=True))
    for lora, gate in zip(plan.loras, gates.get(name, ()), strict=False):
        if name in lora:
            weight = weight + gate.double() * lora[name].B.double() @ lora[name].A.double()
    return weight


def test_weights_are_rounded_once_from_the_sum_over_a_power_of_two_that_never_changes(model):
    plan = switching(model)
    exact = {(name, step): updated(model, plan, name, step) for name in LAYERS for step in range(3)}
    with attached(model, plan, engine="merged", float8=LAYERS) as gate:
        lent = {name: model.get_submodule(name) for name in LAYERS}
        scales = {name: linear.scale.unique() for name, linear in lent.items()}
        assert gate.float8 == len(LAYERS)
        for step in (0, 1, 2, 1):
            gate.set_step(step)
            for name, linear in lent.items():
                [scale] = scales[name]
                assert torch.frexp(scale).mantissa == 0.5 and linear.scale.unique() == scale
                # 2**-4: half of what lies between two numbers of float8; 2**-10: the same below the least normal one.
                error = (linear.quantized.double() * scale - exact[name, step]).abs()
                assert (error <= (exact[name, step].abs() * 2**-4).clamp(min=2**-10 * scale.item()) * 1.001).all()
    assert gate.flips == 1 + 2 + 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 512), (2, 5, 512), (1, 512)], ids=str)
def test_a_product_is_that_of_the_weight_up_to_float8(bias, shape):
    """Rows of any magnitude: each has a scale of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(512, 96, bias=bias)
        x = torch.randn(shape) * 10 ** torch.linspace(-4, 4, shape[-2])[:, None]
    model = nn.ModuleDict({"linear": linear})
    expected = linear(x) - (linear.bias if bias else 0)
    with attached(model, Plan.constant((), ()), engine="merged", float8=["linear"]):
        assert isinstance(model["linear"], Float8Linear)
        difference = model["linear"](x) - (linear.bias if bias else 0) - expected
    assert difference.shape == expected.shape
    assert (difference.norm(dim=-1) < 0.06 * expected.norm(dim=-1)).all()  # 0.04 as errors of 2**-4 at most add up


def test_rows_of_zeros_give_the_bias():
    model = nn.ModuleDict({"linear": nn.Linear(32, 16)})
    with attached(model, Plan.constant((), ()), engine="merged", float8=["linear"]):
        assert torch.equal(model["linear"](torch.zeros(3, 32)), model["linear"].bias.expand(3, -1))


@pytest.mark.parametrize("scale", [2.0, -1.0])
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1.0], ids="weights of {}".format)
def test_nothing_saturates_however_strong_a_lora_is(magnitude, scale):
    """As of a layer that a base's training has left at zero; beside one in which the LoRA never acts, and from the
    second step on."""
    model = nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in ("idle", "linear")})
    model["linear"].weight.data *= magnitude
    pair = LowRank(torch.full((4, 64), 30.0), torch.full((32, 4), -20.0))
    lora = {"idle": pair, "linear": pair}
    plan = Plan(tuple(lora), (lora,), torch.tensor([[[0.0], [0.0]], [[0.0], [scale]]]))
    with attached(model, plan, engine="merged", float8=lora) as gate:
        gate.set_step(1)
        assert all(part.quantized.float().abs().max() <= LARGEST for part in model.values())
        product = model["linear"](torch.ones(1, 64))
    torch.testing.assert_close(product, torch.full((1, 32), -4 * 600 * scale * 64), rtol=0.07, atol=0.0)


@pytest.mark.parametrize("strength", [0.3, 0.03, 0.003])
def test_what_a_weak_lora_adds_is_not_rounded_away(strength):
    """Of elements of dW of a standard deviation that is this share of the weight's; half a step between numbers of
    float8 is 3 to 6 hundredths of an element."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(1024, 256, bias=False)})
    model["linear"].weight.data = torch.randn(256, 1024, generator=generator)
    A, B = torch.randn(4, 1024, generator=generator), torch.randn(256, 4, generator=generator) * strength / 2
    x = torch.randn(2048, 1024, generator=generator)
    products = []
    for lora in ({"linear": LowRank(A, B)}, {"linear": LowRank(A, B * 0)}):
        with attached(model, Plan.constant((lora,), (1.0,)), engine="merged", float8=["linear"]):
            products.append(model["linear"](x))
    added, expected = products[0] - products[1], x @ A.t() @ B.t()
    share = (added * expected).sum() / expected.square().sum()
    assert share == pytest.approx(1, abs=0.05)


def test_scales_are_float32_whatever_the_weights_are():
    model = nn.ModuleDict({"linear": nn.Linear(32, 16)}).bfloat16()
    with attached(model, Plan.constant((), ()), engine="merged", float8=["linear"]):
        assert model["linear"].scale.dtype == torch.float32


def test_layers_that_are_not_named_are_merged_in_their_own_dtype(model):
    plan = switching(model)
    expected = updated(model, plan, "mlp.0", 2)
    with attached(model, plan, engine="merged", float8=["to_q"]) as gate:
        gate.set_step(2)
        linear = model.get_submodule("mlp.0")
        assert type(linear) is nn.Linear and type(model["own"]) is nn.Linear and gate.float8 == 1
        torch.testing.assert_close(linear.weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_all_comes_back(model):
    before = photograph(model)
    with pytest.raises(KeyboardInterrupt), attached(model, switching(model), engine="merged", float8=LAYERS) as gate:
        gate.set_step(1)
        raise KeyboardInterrupt
    assert photograph(model) == before


@pytest.mark.parametrize("without_loras", [False, True])
def test_the_gated_engine_has_no_float8(model, without_loras):
    plan = Plan.constant((), ()) if without_loras else switching(model)
    with attached(model, plan, engine="gated", float8=LAYERS) as gate:
        assert gate.float8 == 0
        assert not [part for part in model.modules() if isinstance(part, Float8Linear)]
        ranks = {len(part.lora_A) for part in model.modules() if isinstance(part, LoRALinear)}
        assert ranks == (set() if without_loras else {5, 3})  # each layer's own


@pytest.mark.parametrize(("spare", "engine"), [(0, "merged"), (-1, "gated")])
def test_weights_in_float8_take_a_byte_an_element(model, monkeypatch, spare, engine):
    free = 48 * 32 + 4 * 80 * 48 + 32 * 80 + HEADROOM_BYTES + spare  # "mlp.0" is adapted, in float32
    monkeypatch.setattr(subject, "free_bytes", lambda device: free)
    with attached(model, switching(model), float8=("to_q", "mlp.1")) as gate:
        assert gate.engine == engine


def test_quantised_weights_are_not_rounded_anew(model, monkeypatch):
    monkeypatch.setattr(subject, "free_bytes", lambda device: 1 << 60)
    model["own"] = model["own"].to(FLOAT8)
    with attached(model, switching(model), float8=("own",)) as gate:
        assert gate.engine == "gated"


@pytest.mark.parametrize(("sizes", "taken"), [((32, 16), True), ((40, 16), False), ((32, 24), False)])
def test_sizes_are_multiples_of_16(sizes, taken):
    assert takes_float8(nn.Linear(*sizes)) is taken
