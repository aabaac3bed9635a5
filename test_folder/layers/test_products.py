"""attached() computes W + dW at every step, in every dtype."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from klora.errors import RequestError
from klora.fusion import Schedule, fuse
from klora.layers import attached
from klora.lora import LowRank, Plan, Step
from test_folder.layers.network import ENGINES, LAYERS, dense, random_lora, switching_plan, two_loras


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_in_any_order_equals_dense_weights(network, x, engine):
    plan = switching_plan(network)
    expected = [dense(network, plan, step)(x) for step in range(len(plan.gates))]
    with attached(network, plan, engine=engine) as gate:
        for step in [0, 1, 2, 3, 4, 5, 6, 7, 3, 0, 7, 1, 1, 6]:
            gate.set_step(step)
            torch.testing.assert_close(network(x), expected[step], rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("engine", ENGINES)
def test_block_begins_at_step_0(network, x, engine):
    plan = switching_plan(network)
    expected = dense(network, plan, 0)(x)
    with attached(network, plan, engine=engine):
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("engine", ENGINES)
def test_two_loras_that_act_at_once_equal_dense_weights(network, x, engine):
    plan = Plan.constant(two_loras(network), (0.7, 1.3))
    expected = dense(network, plan, 0)(x)
    with attached(network, plan, engine=engine):
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("engine", ENGINES)
def test_told_that_all_steps_are_over_the_last_ones_choice_stays(network, x, engine):
    with attached(network, switching_plan(network), engine=engine) as gate:
        gate.set_step(7)
        expected = network(x)
        gate.set_step(8)
        assert torch.equal(network(x), expected)


@pytest.mark.parametrize("step", [-1, 9, Step(0, 7), Step(8, 30)])
def test_a_step_of_another_schedule_is_refused_and_nothing_moves(network, x, step):
    with attached(network, switching_plan(network)) as gate:
        expected = network(x)
        with pytest.raises(RequestError, match=r"8 are planned\. Expected"):
            gate.set_step(step)
        assert torch.equal(network(x), expected)


def test_what_always_acts_does_so_in_any_number_of_steps(network, x):
    lora = random_lora(network, LAYERS, 2, seed=1)
    with attached(network, Plan.constant((lora,), (1.0,))) as gate:
        expected = network(x)
        for step in (0, 1, Step(29, 30)):
            assert torch.equal((gate.set_step(step), network(x))[1], expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS)
def test_lent_layer_still_shows_what_pipelines_ask_a_linear(network, engine, name):
    """SDXL's pipelines read add_embedding.linear_1.in_features, T5 reads wo.weight."""
    original = network.get_submodule(name)
    weight, bias, sizes = original.weight, original.bias, (original.in_features, original.out_features)
    with attached(network, switching_plan(network), engine=engine):
        lent = network.get_submodule(name)
        assert (lent.in_features, lent.out_features) == sizes
        assert (lent.weight.shape, lent.weight.dtype, lent.weight.device) == (weight.shape, weight.dtype, weight.device)
        assert lent.bias is bias


@pytest.mark.parametrize("frozen", [False, True])
def test_merged_weight_asks_for_gradients_as_the_bases_does_and_is_written_without_any(network, frozen):
    """Also where nobody has switched them off."""
    network.requires_grad_(not frozen)
    with torch.enable_grad(), attached(network, switching_plan(network), engine="merged") as gate:
        gate.set_step(3)
        assert all(weight.is_leaf and weight.requires_grad is not frozen for weight in network.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_gates_of_zero_leave_the_output_bit_for_bit(network, x, engine):
    expected = network(x)
    with attached(network, Plan.constant(two_loras(network), (0.0, 0.0)), engine=engine):
        assert torch.equal(network(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_fusion_of_scales_0_leaves_the_output_bit_for_bit(network, x, engine):
    expected, fusion, steps = network(x), fuse(*two_loras(network)), 4
    schedule, scales = Schedule.from_pattern("s"), {"content_scale": 0.0, "style_scale": 0.0}
    with attached(network, fusion, schedule, engine=engine, steps=steps, **scales) as gate:
        for step in range(steps):
            gate.set_step(step)
            assert torch.equal(network(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_plan_without_loras_leaves_the_output_bit_for_bit(network, x, engine):
    expected = network(x)
    with attached(network, Plan.constant((), ()), engine=engine) as gate:
        assert torch.equal(network(x), expected)
        assert gate.set_step(1).flips == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_content_everywhere_equals_the_content_lora_in_dense_weights(network, x, engine):
    content, style = (random_lora(network, LAYERS, rank, seed=rank) for rank in (2, 3))
    expected = dense(network, Plan.constant((content,), (1.0,)), 0)(x)
    never_style = Schedule.from_pattern("s", alpha=0.0, beta=0.0)
    with attached(network, fuse(content, style), never_style, steps=2, engine=engine):
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_that_peft_wrote_gives_peft_s_output(network, x, engine):
    rank, alpha = 4, 8
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LAYERS), init_lora_weights=False)
    theirs = inject_adapter_in_model(config, copy.deepcopy(network)).eval()
    written = get_peft_model_state_dict(theirs)
    factors = {name: [written[f"{name}.lora_{part}.weight"] for part in "AB"] for name in LAYERS}
    ours = {name: LowRank(A, B * alpha / rank) for name, (A, B) in factors.items()}
    assert not torch.allclose(theirs(x), network(x), atol=1e-2)
    with attached(network, Plan.constant((ours,), (1.0,)), engine=engine):
        torch.testing.assert_close(network(x), theirs(x), rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_computes_in_its_own_dtype(network, x, engine, dtype):
    plan, half = switching_plan(network), copy.deepcopy(network).to(dtype)
    expected = dense(network, plan, 3)(x)
    with attached(half, plan, engine=engine) as gate:
        gate.set_step(3)
        output = half(x.to(dtype))
    assert output.dtype == dtype
    # 5 in 100: 2**-8 (bfloat16) for each of a dozen roundings
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
