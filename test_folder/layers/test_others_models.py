"""Models as others have them: moved while LoRAs are lent to them, compiled, offloaded, under autocast, fused, adapted;
and LoRAs that are being trained."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model

from klora.errors import LoRAError, RequestError
from klora.layers import attached
from klora.lora import Plan
from test_folder import tiny
from test_folder.layers.network import ENGINES, dense, random_lora, switching_plan


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_is_moved_meanwhile_still_follows_the_steps(engine, network, x):
    """Offloading moves a denoiser to its GPU when it is first called: its parameters' tensors are others then."""
    plan = switching_plan(network)
    expected = [dense(network, plan, step)(x) for step in range(len(plan.gates))]
    with attached(network, plan, engine=engine) as gate:
        network.double().float()
        for step, right in enumerate(expected):
            gate.set_step(step)
            torch.testing.assert_close(network(x), right)


def test_beside_activations_elsewhere_the_gated_engine_computes_where_they_are(network):
    with attached(network, switching_plan(network), engine="gated"):
        network.to_q.base.to("meta")
        assert network.to_q(torch.empty(5, 6, device="meta")).is_meta


def test_what_torch_compile_made_has_the_layers_of_what_it_was_made_of(network, x):
    plan = switching_plan(network)
    expected, compiled = dense(network, plan, 0)(x), torch.compile(network, backend="eager")
    with attached(compiled, plan):
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_under_autocast_every_step_has_its_own_weights(engine, network, x):
    """Autocast keeps what it has cast, and may have cast a weight before it was written anew."""
    plan, cast = switching_plan(network), torch.autocast("cpu", torch.bfloat16)
    expected = []
    for step in range(len(plan.gates)):
        with cast:
            expected.append(dense(network, plan, step)(x))
    with torch.no_grad(), cast, attached(network, plan, engine=engine) as gate:
        for step, right in enumerate(expected):
            gate.set_step(step)
            torch.testing.assert_close(network(x), right, rtol=0, atol=0.05)  # bfloat16; a step's weights make it 0.3


@pytest.mark.parametrize("engine", ENGINES)
def test_factors_that_are_being_trained_are_lent_as_they_are(engine, network, x):
    plan = switching_plan(network)
    expected = dense(network, plan, 0)(x)
    for pair in (pair for lora in plan.loras for pair in lora.values()):
        pair.A.requires_grad_()
        pair.B.requires_grad_()
    with torch.enable_grad(), attached(network, plan, engine=engine):
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_whose_weights_come_layer_by_layer_is_refused(engine, network):
    plan = switching_plan(network)
    cpu_offload(network, torch.device("cpu"))
    with pytest.raises(LoRAError, match="offloaded layer by layer"), attached(network, plan, engine=engine):
        pass


@pytest.mark.parametrize("groups", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"])
def test_a_base_that_diffusers_offloads_in_groups_keeps_its_parameters(groups, network, x, tmp_path):
    """It brings those that it knows, from a file, and leaves nothing in them meanwhile."""
    plan = switching_plan(network)
    expected = [dense(network, plan, step)(x) for step in range(len(plan.gates))]
    cpu = torch.device("cpu")
    apply_group_offloading(network, cpu, cpu, offload_to_disk_path=str(tmp_path), **groups)
    with pytest.raises(RequestError, match=r"the base is offloaded in groups\. Expected 'gated'"):
        attached(network, plan, engine="merged").__enter__()
    with attached(network, plan) as gate:
        assert gate.engine == "gated"
        for step, right in enumerate(expected):
            gate.set_step(step)
            torch.testing.assert_close(network(x), right)


def test_a_base_that_diffusers_stores_in_fewer_bits_than_it_computes_in_has_factors_as_exact_as_its_products():
    model, name = tiny.full_topology_flux(), "transformer_blocks.0.attn.to_q"
    lora = random_lora(model, [name], 2, seed=1)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    linear = model.get_submodule(name)
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(1))
    expected = linear(x) + F.linear(x, lora[name].B @ lora[name].A)
    with attached(model, Plan.constant((lora,), (1.0,))):
        torch.testing.assert_close(model.get_submodule(name)(x), expected)
    assert model.get_submodule(name) is linear and linear.weight.dtype is torch.float8_e4m3fn


def test_projections_that_run_fused_are_refused():
    """What stands in the place of one of them is never called."""
    attention = Attention(query_dim=8, heads=1, dim_head=8)
    plan = Plan.constant((random_lora(attention, ["to_q"], 2, seed=1),), (1.0,))
    attention.fuse_projections()
    with pytest.raises(LoRAError, match="loaded anew"), attached(attention, plan):
        pass


def test_a_base_with_adapters_of_peft_is_told_of_them(network):
    plan = switching_plan(network)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), network)
    with pytest.raises(LoRAError, match=r"no adapters on the base: unload_lora_weights\(\)"), attached(network, plan):
        pass


def test_layers_that_the_gated_engine_has_replaced_are_replaced_by_no_other(network):
    plan = switching_plan(network)
    with attached(network, plan, engine="gated"), pytest.raises(LoRAError, match=r"its end those of another attached"):
        attached(network, plan).__enter__()
