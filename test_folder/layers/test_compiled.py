"""Compiled code is traced once, whatever flips."""

import pytest
import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock
from torch._dynamo.testing import CompileCounter

from klora.fusion import Schedule, fuse
from klora.layers import attached
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
