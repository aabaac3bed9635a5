"""attached() computes W + dW, moves with the steps, and gives everything back whatever happens."""

import copy
import ctypes
import dis
import random
import re
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cog import CancelationException
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from klora import layers as subject
from klora.errors import LoRAError
from klora.fusion import Schedule, fuse
from klora.layers import HEADROOM_BYTES, Gate, LoRALinear, attached
from klora.lora import LowRank, Plan
from klora.models import family
from klora.models.family import execution_order, following
from test_folder import published, tiny

ENGINES = ["gated", "merged"]
LAYERS = ("to_q", "mlp.0", "mlp.2")


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Network(nn.Module):
    """Linears at the top and deeper down, with and without bias, and parts that no LoRA touches."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.mlp = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6))
        self.untouched = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.untouched(self.mlp(self.norm(self.to_q(x))))


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().eval()


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def random_lora(model, names, rank, seed):
    shapes = tiny.linear_shapes(model)
    drawn = tiny.random_lora({name: shapes[name] for name in names}, rank, seed=seed)
    return {name: LowRank(*pair) for name, pair in drawn.items()}


def two_loras(model):
    """Content and style share the first layer; each has one of the others, and their ranks differ."""
    return random_lora(model, LAYERS[:2], 3, seed=1), random_lora(model, LAYERS[::2], 2, seed=2)


def switching_plan(model, steps=8, seed=2):
    """A layer changes hands after some steps and not after others; strengths are not 1."""
    wins = torch.rand(steps, len(LAYERS), generator=torch.Generator().manual_seed(seed)) < 0.5
    return Plan(LAYERS, two_loras(model), torch.stack([wins * 0.7, ~wins * 1.3], dim=-1))


def changes(plan):
    """Whether a layer's gates differ from those of the step before: bool [steps - 1, layers]."""
    return (plan.gates[1:] != plan.gates[:-1]).any(-1)


def dense(model, plan, step):
    """A copy of the model whose weights are W + dW."""
    merged = copy.deepcopy(model)
    for index, name in enumerate(plan.layers):
        for part, gate in zip(plan.loras, plan.gates[step, index], strict=True):
            if name in part:
                merged.get_submodule(name).weight.data += gate * (part[name].B @ part[name].A)
    return merged


def photograph(model):
    """All that must be as before: the module tree in order, and every tensor's identity and bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [
            (name, id(module), *module._parameters, *module._modules, *module._forward_pre_hooks)
            for name, module in model.named_modules()
        ],
        [(name, id(tensor), tensor.requires_grad, tensor.numpy(force=True).tobytes()) for name, tensor in tensors],
        list(model.state_dict()),
    )


# What is computed


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
def test_step_beyond_the_last_keeps_the_last(network, x, engine):
    with attached(network, switching_plan(network), engine=engine) as gate:
        gate.set_step(7)
        expected = network(x)
        for step in (8, 9, 1000):
            gate.set_step(step)
            assert torch.equal(network(x), expected)


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


# The merged engine's economy, and the gate's account


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


# Everything comes back


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


ON_3_11 = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="where Python delivers exceptions depends on its version"
)


class Interruption(BaseException):
    """What a server throws into a thread to cancel it."""


class Interrupter:
    """A tracer that raises at the n-th place where CPython 3.11 would deliver an exception from outside: as a function
    begins or a generator goes on, after a call, and at a jump backwards."""

    def __init__(self, files, n):
        self.files, self.left, self.place = files, n, None
        self.previous = {}

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if self.may_interrupt(frame, event):
            self.left -= 1
            if self.left == 0:
                self.place = f"{frame.f_code.co_name}, line {frame.f_lineno}, {event}"
                raise Interruption
        return self

    def may_interrupt(self, frame, event):
        if event == "opcode":
            operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            previous, self.previous[id(frame)] = self.previous.get(id(frame)), operation
            return "JUMP_BACKWARD" in operation or previous in ("CALL", "CALL_FUNCTION_EX")
        self.previous.pop(id(frame), None)
        return event == "call"


def visit_all_steps(model, plan, engine):
    with attached(model, plan, engine=engine) as gate:
        for step in range(len(plan.gates)):
            gate.set_step(step)


def follow_one_step(denoiser):
    scheduler = SimpleNamespace(timesteps=[1], num_inference_steps=1)
    pipe = SimpleNamespace(unet=denoiser, scheduler=scheduler, num_timesteps=1)
    with following(pipe, lambda step: None) as on_step_end:
        denoiser(torch.zeros(1, 6))
        on_step_end(pipe, 0, 1, {})


def interrupted_at(n, module, work, *inputs):
    """Where the n-th interruption landed in that module's part of the work; None when the work was over before."""
    interrupter = Interrupter({__file__, module.__file__, sys.modules["contextlib"].__file__}, n)
    tracer = sys.gettrace()
    try:
        sys.settrace(interrupter)
        work(*inputs)
    except Interruption:
        pass
    finally:
        sys.settrace(tracer)
    return interrupter.place


def places_that_leave_a_trace(network, module, work, *inputs):
    """Of all places where an interruption may land, those after which the network is not as before."""
    landed, spoilt = [], []
    while len(landed) < 2000:
        model = copy.deepcopy(network)
        before = photograph(model)
        place = interrupted_at(len(landed) + 1, module, work, model, *inputs)
        if photograph(model) != before:
            spoilt.append(place)
        if place is None:
            return landed, spoilt
        landed.append(place)
    raise AssertionError("The work never ends.")


@ON_3_11
@pytest.mark.parametrize("engine", ENGINES)
def test_interruption_wherever_python_may_deliver_one_leaves_no_trace(network, engine):
    plan = switching_plan(network, steps=3)
    landed, spoilt = places_that_leave_a_trace(network, subject, visit_all_steps, plan, engine)
    assert len(landed) > 100
    assert spoilt == []


@ON_3_11
def test_interruption_of_the_follower_of_a_pipeline_leaves_no_hook(network):
    landed, spoilt = places_that_leave_a_trace(network, family, follow_one_step)
    assert len(landed) > 10
    assert spoilt == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_exception_thrown_in_by_another_thread_at_a_random_moment_leaves_no_trace(network, engine):
    before, plan, moments = photograph(network), switching_plan(network), random.Random(0)
    interrupted = 0

    def work():
        nonlocal interrupted
        try:
            for _ in range(100):  # not for ever: Python swallows an exception that lands in a destructor
                visit_all_steps(network, plan, engine)
        except Interruption:
            interrupted += 1

    for _ in range(100):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(moments.random() * 0.005)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interruption))
        thread.join()
        assert photograph(network) == before
    assert interrupted > 50


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


# Which engine


class Quantized(nn.Linear):
    """A linear of int8 weights, as quantisation libraries make them: a subclass, its own forward."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.unit = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.unit).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.unit)


class Renamed(nn.Linear):
    """A linear whose weights may not be what its forward multiplies by."""


def weight_bytes(model):
    return sum(model.get_submodule(name).weight.nbytes for name in LAYERS)


@pytest.mark.parametrize(("spare", "engine"), [(0, "merged"), (-1, "gated")])
def test_engine_is_merged_where_a_copy_of_the_touched_weights_fits(monkeypatch, network, spare, engine):
    free = weight_bytes(network) + HEADROOM_BYTES + spare
    monkeypatch.setattr(subject, "free_bytes", lambda device: free)
    with attached(network, switching_plan(network)) as gate:
        assert gate.engine == engine


@pytest.mark.parametrize(
    "layer",
    [Quantized(nn.Linear(6, 8)), Renamed(6, 8, bias=False), nn.Linear(6, 8, bias=False).to(torch.float8_e4m3fn)],
    ids=["int8", "subclass", "float8"],
)
def test_engine_is_gated_for_weights_that_cannot_be_written(monkeypatch, network, layer):
    monkeypatch.setattr(subject, "free_bytes", lambda device: 1 << 60)
    network.to_q = layer
    with attached(network, switching_plan(network)) as gate:
        assert gate.engine == "gated"


def test_lora_acts_on_int8_weights(monkeypatch, network, x):
    network.to_q = Quantized(network.to_q)
    lora = random_lora(network, ["to_q"], 2, seed=1)
    expected = network.to_q(x) + F.linear(x, lora["to_q"].B @ lora["to_q"].A)
    with attached(network, Plan.constant((lora,), (1.0,))):
        # 2 in 100: the factors are bfloat16 there, 2**-9 each
        torch.testing.assert_close(network.to_q(x), expected, rtol=0.02, atol=0.02)


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


# Compiled code


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


# The published models


UNET_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
FLUX_ATTENTION = r"\.attn\.to_(q|k|v|out\.0)$"
FLUX_BLOCKS = r"^(single_)?transformer_blocks\."
UNET = (published.unet, tiny.full_topology_unet, tiny.unet_inputs)
FLUX = (published.flux, tiny.full_topology_flux, tiny.flux_inputs)


@cache
def linears_in_execution_order(build, inputs):
    with torch.device("meta"):
        model = build()
    return list(execution_order(model, inputs(model, device="meta")))


@pytest.mark.parametrize(
    ("real", "narrow", "inputs", "pattern", "count"),
    [(*UNET, UNET_ATTENTION, 560), (*FLUX, FLUX_ATTENTION, 190), (*FLUX, FLUX_BLOCKS, 494)],
)
def test_published_model_has_as_many_layers_as_published_and_the_narrow_one_the_same(
    real, narrow, inputs, pattern, count
):
    names = linears_in_execution_order(real, inputs)
    assert len([name for name in names if re.search(pattern, name)]) == count
    assert linears_in_execution_order(narrow, inputs) == names


def test_published_unet_runs_its_attention_down_then_mid_then_up():
    names = linears_in_execution_order(published.unet, tiny.unet_inputs)
    sections = [name.partition("_")[0] for name in names if re.search(UNET_ATTENTION, name)]
    assert sections == ["down"] * 192 + ["mid"] * 80 + ["up"] * 288


@pytest.mark.parametrize(
    ("build", "inputs", "pattern", "count"),
    [(*UNET[1:], UNET_ATTENTION, 560), (*FLUX[1:], FLUX_BLOCKS, 494)],
    ids=["sdxl", "flux"],
)
def test_output_depends_on_the_gate_of_every_layer(build, inputs, pattern, count):
    model = build()
    names = [name for name in linears_in_execution_order(build, inputs) if re.search(pattern, name)]
    plan = Plan.constant((random_lora(model, names, 2, seed=1), random_lora(model, names, 1, seed=2)), (1.0, 0.5))
    with attached(model, plan, engine="gated"), torch.enable_grad():
        wrapped = {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}
        for part in wrapped.values():
            part.gate = part.gate.clone().requires_grad_()
        model(**inputs(model)).sample.square().sum().backward()
        dead = [name for name, part in wrapped.items() if part.gate.grad is None or not part.gate.grad.all()]
    assert len(wrapped) == count
    assert dead == []
