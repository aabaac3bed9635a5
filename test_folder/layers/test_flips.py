"""The merged engine rewrites what flips and nothing else, and the gate counts it."""

import pytest
import torch

from klora.layers import Gate, attached
from klora.lora import Plan
from test_folder.layers.network import ENGINES, LAYERS, changes, switching_plan


def test_merged_rewrites_the_layers_that_flip_once_and_no_other(network):
    plan = switching_plan(network)
    assert changes(plan).any()
    assert not changes(plan).all()
    with attached(network, plan, engine="merged") as gate:
        weights = [network.get_submodule(name).weight for name in LAYERS]
        for step, changed in enumerate(changes(plan), start=1):
            before = [weight._version for weight in weights]
            gate.set_step(step)
            assert [weight._version - old for weight, old in zip(weights, before, strict=True)] == changed.tolist()


def test_thousand_flips_to_and_fro_leave_the_bits_of_the_first_time(network):
    plan = switching_plan(network)
    flipping = Plan(plan.layers, plan.loras, torch.stack([plan.gates[0], 2 - plan.gates[0]]))
    with attached(network, flipping, engine="merged") as gate:
        first = [network.get_submodule(name).weight.numpy().tobytes() for name in LAYERS]
        for flip in range(1, 1001):
            gate.set_step(flip % 2)
        assert [network.get_submodule(name).weight.numpy().tobytes() for name in LAYERS] == first
        assert gate.flips == 1000 * len(LAYERS)


@pytest.mark.parametrize("engine", ENGINES)
def test_flips_are_the_changes_in_the_plan(network, engine):
    plan = switching_plan(network)
    with attached(network, plan, engine=engine) as gate:
        assert gate.flips == 0
        for step in range(len(plan.gates)):
            gate.set_step(step)
            assert gate.flips == changes(plan)[:step].sum()
        gate.set_step(len(plan.gates))
    assert gate.flips == changes(plan).sum()


def test_block_yields_a_gate_that_says_its_engine_and_returns_itself(network):
    for engine in ENGINES:
        with attached(network, switching_plan(network), engine=engine) as gate:
            assert isinstance(gate, Gate)
            assert gate.engine == engine
            assert gate.set_step(3) is gate
