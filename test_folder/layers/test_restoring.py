"""However a block is left, or refused to begin, everything comes back."""

import copy
import re
from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload
from cog import CancelationException

from klora.errors import LoRAError, RequestError
from klora.layers import attached, clear, lending
from klora.lora import LowRank, Plan
from test_folder.layers.network import ENGINES, LAYERS, dense, photograph, random_lora, switching_plan


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, GeneratorExit, CancelationException])
def test_leaving_at_any_step_in_any_way_leaves_no_trace(network, x, engine, error):
    before, plan = photograph(network), switching_plan(network)
    for last in range(len(plan.gates)):
        with suppress(error or ()), attached(network, plan, engine=engine) as gate:
            for step in range(last + 1):
                gate.set_step(step)
                network(x)
            assert photograph(network) != before
            if error:
                raise error
        assert photograph(network) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_error_inside_a_forward_leaves_no_trace(network, engine):
    before = photograph(network)
    with pytest.raises(RuntimeError), attached(network, switching_plan(network), engine=engine):
        network(torch.zeros(5, 7))
    assert photograph(network) == before


@pytest.mark.parametrize("inner", ENGINES)
@pytest.mark.parametrize(
    ("outer", "layers"), [("merged", LAYERS), ("merged", ("mlp.2",)), ("gated", ("mlp.2",))], ids=str
)
def test_nested_blocks_add_up_and_are_undone_in_order(network, x, outer, layers, inner):
    first = Plan.constant((random_lora(network, layers, 3, seed=5),), (0.5,))
    second = Plan.constant((random_lora(network, LAYERS[:2], 2, seed=6),), (2.0,))
    before, alone = photograph(network), dense(network, first, 0)
    with attached(network, first, engine=outer):
        between = photograph(network)
        with attached(network, second, engine=inner):
            # 1e-5: float32 sums in another order
            torch.testing.assert_close(network(x), dense(alone, second, 0)(x), rtol=0, atol=1e-5)
        assert photograph(network) == between
        torch.testing.assert_close(network(x), alone(x), rtol=0, atol=1e-5)
    assert photograph(network) == before


def test_an_outer_block_whose_steps_change_beneath_merged_weights_is_refused(network, x):
    """They were made of its own, and would stay as they are."""
    before, plan, alone = photograph(network), switching_plan(network), copy.deepcopy(network)
    with (
        attached(network, plan, engine="merged") as outer,
        attached(network, switching_plan(network), engine="merged") as inner,
    ):
        with pytest.raises(RequestError, match="inner one alone"):
            outer.set_step(3)
        inner.set_step(3)
        torch.testing.assert_close(network(x), dense(dense(alone, plan, 0), plan, 3)(x), rtol=0, atol=1e-5)
    assert photograph(network) == before


def test_an_outer_block_may_change_steps_where_no_inner_one_lies_over_it(network, x):
    plan, alone = switching_plan(network), copy.deepcopy(network)
    plan.gates[:, :2] = plan.gates[0, :2]
    inner = Plan.constant((random_lora(network, LAYERS[:1], 2, seed=6),), (2.0,))
    step = int((plan.gates[:, 2] != plan.gates[0, 2]).any(-1).nonzero()[0])
    with attached(network, plan, engine="merged") as outer, attached(network, inner, engine="merged"):
        outer.set_step(step)
        torch.testing.assert_close(network(x), dense(dense(alone, plan, step), inner, 0)(x), rtol=0, atol=1e-5)


def test_merged_weights_that_offloading_has_replaced_are_refused(network):
    with attached(network, switching_plan(network), engine="merged") as gate:
        cpu_offload(network, torch.device("cpu"))
        with pytest.raises(RequestError, match="no offloading within"):
            gate.set_step(3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["norm", "mlp", "mlp.1", "mlp.7", "nowhere.at.all", "", "to_q.weight"])
def test_name_that_is_no_linear_is_refused_and_leaves_no_trace(network, engine, name):
    before, good = photograph(network), random_lora(network, ["to_q"], 2, seed=1)
    lora = good | {name: good["to_q"]}
    with pytest.raises(LoRAError, match=re.escape(f"{name!r} is no linear layer of Network.") + r" Expected .*\.$"):
        attached(network, Plan.constant((lora,), (1.0,)), engine=engine).__enter__()
    assert photograph(network) == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rows", "columns"), [(8, 5), (7, 6), (1, 6), (8, 1), (6, 8)])
def test_lora_of_another_shape_is_refused_and_leaves_no_trace(network, engine, rows, columns):
    before, lora = photograph(network), random_lora(network, LAYERS, 2, seed=1)
    lora["to_q"] = LowRank(torch.ones(2, columns), torch.ones(rows, 2))
    with pytest.raises(LoRAError, match=r"'to_q'.*\.$"):
        attached(network, Plan.constant((lora,), (1.0,)), engine=engine).__enter__()
    assert photograph(network) == before


def test_what_is_cleared_is_not_there_meanwhile_and_as_before_afterwards():
    slots = {"kept": 1}
    with lending() as loans:
        for key in ("kept", "new"):
            clear(loans, slots, key)
        assert slots == {}
        slots |= {"kept": 2, "new": 3}
    assert slots == {"kept": 1}
