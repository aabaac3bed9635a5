"""Compiled code is traced once, whatever flips."""

import pytest
import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from torch._dynamo.testing import CompileCounter

from klora.fusion import Schedule, fuse
from klora.layers import LoRALinear, attached
from klora.lora import Plan
from test_folder import tiny
from test_folder.layers.network import ENGINES, random_lora


@pytest.fixture
def block():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BasicTransformerBlock(dim=16, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=12).eval()


@pytest.mark.parametrize("compiled_before", [False, True], ids=["compiled inside", "compiled before"])
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_block_is_traced_once_whatever_flips(block, engine, compiled_before):
    torch._dynamo.reset()
    names = [name for name in tiny.linear_shapes(block) if name.startswith("attn")]
    content, style = (random_lora(block, names, rank, seed=rank) for rank in (2, 3))
    tokens = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    prompt = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(1))
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter)
    if compiled_before:
        compiled(tokens, encoder_hidden_states=prompt)
    with attached(block, fuse(content, style), Schedule.from_pattern("s*"), steps=12, engine=engine) as gate:
        compiled(tokens, encoder_hidden_states=prompt)
        graphs = counter.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(12):
                gate.set_step(step)
                output = compiled(tokens, encoder_hidden_states=prompt)
                # the same graph, computed by the same kernels
                torch.testing.assert_close(output, block(tokens, encoder_hidden_states=prompt), rtol=0, atol=1e-6)
        assert gate.flips > len(names)
    assert graphs == (2 if compiled_before and engine == "gated" else 1)  # merged leaves all modules as they are
    assert counter.frame_count == graphs


def test_code_compiled_with_one_pair_serves_every_other_where_all_are_alike(block):
    """Whatever their ranks and layers; only the gates' own changes count as flips."""
    torch._dynamo.reset()
    linears = list(tiny.linear_shapes(block))
    tokens = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    prompt = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(1))
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, dynamic=True)
    # torch would take a rank that a layer's inputs equal for the same size, always: 32 is none's.
    for ranks, names in (((20, 10), linears), ((2, 3), linears[:4]), ((1, 15), linears[-1:]), ((40, 7), linears[1::2])):
        loras = tuple(random_lora(block, names, rank, seed=rank) for rank in ranks)
        gates = torch.tensor([[1.0, 0.0], [0.0, 0.7], [0.0, 0.7]])[:, None].expand(3, len(names), 2)
        plan = Plan(tuple(names), loras, gates)
        for step in range(3):
            with attached(block, plan, engine="merged") as gate:
                gate.set_step(step)
                expected = block(tokens, encoder_hidden_states=prompt)
            with attached(block, plan, engine="gated", alike=linears) as gate:
                gate.set_step(step)
                output = compiled(tokens, encoder_hidden_states=prompt)
                lent = [module for module in block.modules() if isinstance(module, LoRALinear)]
            [rank] = {len(module.lora_A) for module in lent}
            assert len(lent) == len(linears) and rank % 16 == 0
            assert gate.flips == (len(names) if step else 0)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_without_loras_nothing_is_made_alike(block):
    with attached(block, Plan.constant((), ()), engine="gated", alike=tiny.linear_shapes(block)):
        assert not [module for module in block.modules() if isinstance(module, LoRALinear)]
