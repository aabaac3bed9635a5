"""What a step costs: the published models' figures, and on the tiny ones what a real step is counted to cost."""

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from klora.models import FAMILIES, load_model
from klora.models.family import Family, Part
from klora.models.linears import linear_shapes
from klora.training import cost
from klora.training.config import TrainConfig
from klora.training.cost import step_flops, step_memory
from klora.training.memory import TRAINED_BYTES, WORKSPACE_BYTES
from klora.training.objective import Objective
from test_folder import published
from test_folder.test_objective import LEVELS, a_batch, lent
from test_folder.tiny import BASES
from test_folder.trainer.material import CPU

# The published models: how to build them, their depths, latent channels, sizes of a prompt and of what is pooled of it.
REAL = {
    "sdxl": (published.unet, (2, 10), 4, (77, 2048), 1280),
    "flux": (published.flux, (19, 38), 16, (512, 4096), 768),
}


every_family = pytest.mark.parametrize("family", FAMILIES)


def loaded(family: str, bases: Path, *parts: Part) -> Family:
    return load_model(family, bases / BASES[family], CPU, parts=parts)


def real_step(
    family: str, bases: Path, side: int, rank: int, depths: tuple[int, int]
) -> tuple[Family, dict[str, tuple[int, int]], int, tuple[int, ...], dict[str, torch.Tensor]]:
    """What a step of the published model is counted by: the arguments of step_flops and step_memory."""
    build, _, channels, prompt, pooled = REAL[family]
    model, denoiser = loaded(family, bases), published.random(partial(build, depths), "meta", torch.bfloat16)
    model.pipe.register_modules(**{model.component: denoiser})
    model.denoiser = denoiser
    texts = {"prompt_embeds": torch.zeros(1, *prompt), "pooled_prompt_embeds": torch.zeros(1, pooled)}
    shapes = linear_shapes(denoiser)
    shapes = {name: shapes[name] for name in TrainConfig(lora_targets="attention").targets(shapes)}
    return model, shapes, rank, (1, channels, side // 8, side // 8), texts


def of_the_deep_one(count: Callable[..., int], family: str, bases: Path, side: int, **options: Any) -> float:
    """What count says of a step of the published model. Blocks are alike, so that each of either kind adds the same:
    three shallow models tell of the deep one, which gave the table's figures."""
    one, first, second = (count(*real_step(family, bases, side, 16, depths), **options)
                          for depths in ((1, 1), (2, 1), (1, 2)))  # fmt: skip
    depths = REAL[family][1]
    return one + (depths[0] - 1) * (first - one) + (depths[1] - 1) * (second - one)


def saved_bytes(*step: Any, **options: Any) -> int:
    return step_memory(*step, **options).saved_bytes


@pytest.mark.parametrize(
    ("family", "side", "checkpointing", "teraflops"),
    [("sdxl", 1024, True, 19.34), ("flux", 1024, False, 163.9), ("flux", 512, True, 66.2)],
)
def test_a_step_of_the_published_models_costs_what_the_table_says(
    bases: Path, family: str, side: int, checkpointing: bool, teraflops: float
) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "checkpointing": checkpointing}
    assert of_the_deep_one(step_flops, family, bases, side, **options) == pytest.approx(teraflops * 1e12, rel=0.01)


def test_a_step_of_flux_at_512_px_keeps_what_the_table_says(bases: Path) -> None:
    kept = of_the_deep_one(saved_bytes, "flux", bases, 512, dtype=torch.bfloat16, checkpointing=True)
    assert kept == pytest.approx(0.55e9, rel=0.05)


def test_sdxl_at_1024_px_trains_within_12_gb(bases: Path) -> None:
    """And keeps of its activations what the table says, whatever the rank."""
    step = real_step("sdxl", bases, 1024, 8, REAL["sdxl"][1])
    memory = step_memory(*step, dtype=torch.bfloat16, checkpointing=True)
    weights = sum(weight.numel() for weight in step[0].denoiser.parameters())
    trained = sum(8 * sum(shape) for shape in step[1].values())
    assert memory.saved_bytes == pytest.approx(0.46e9, rel=0.02) and memory.peak_bytes > memory.saved_bytes
    assert weights == 2_567_463_684
    assert 2 * weights + TRAINED_BYTES * trained + memory.peak_bytes + WORKSPACE_BYTES < 12e9


def tiny(step: Callable[..., Any], model: Family, count: int = 1, checkpointing: bool = False) -> Any:
    """What step_flops or step_memory says of what a_batch and lent make."""
    batch, options = a_batch(model, times=LEVELS[:count]), {"dtype": torch.float32, "checkpointing": checkpointing}
    return step(model, linear_shapes(model.denoiser), 2, batch.latents.shape, batch.conditioning, **options)


@every_family
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_real_step_costs_what_was_foretold(family: str, bases: Path, checkpointing: bool) -> None:
    model = loaded(family, bases, "denoiser")
    if checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    # torch counts plain attention, which the meta device has too; what a CPU has in its place it leaves out.
    with lent(model) as (gate, _), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        Objective(model, gate)(a_batch(model)).backward()
    assert flops.get_total_flops() == tiny(step_flops, loaded(family, bases), 2, checkpointing) > 0


@every_family
def test_twice_the_batch_is_twice_the_arithmetic_recomputing_is_more_in_less_memory_and_nothing_is_left(
    family: str, bases: Path
) -> None:
    model = loaded(family, bases)
    before = list(model.denoiser.named_modules())
    once, twice, again = (tiny(step_flops, model, *options) for options in ((1,), (2,), (1, True)))
    assert twice == 2 * once < 2 * again < 3 * once
    kept, recomputed = tiny(step_memory, model), tiny(step_memory, model, checkpointing=True)
    assert recomputed.saved_bytes < kept.saved_bytes and recomputed.peak_bytes < kept.peak_bytes
    assert list(model.denoiser.named_modules()) == before  # and so without LoRALinear
    assert all(weight.is_meta and weight.grad is None for weight in model.denoiser.parameters())


@every_family
def test_what_is_remembered_of_blocks_alike_is_what_torch_says_of_each(
    family: str, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(family, bases)
    tiny(step_memory, model)  # a first step also makes the base's table of noise levels
    remembered = tiny(step_memory, model, 2, checkpointing=True)
    monkeypatch.setattr(cost, "_ShapeCache", nullcontext)
    assert tiny(step_memory, model, 2, checkpointing=True) == remembered


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@every_family
def test_no_step_does_more_than_the_one_before_or_waits_for_the_device(family: str, bases: Path) -> None:
    model, steps = loaded(family, bases, "denoiser"), list[Counter[str]]()
    with lent(model) as (gate, parameters):
        objective = Objective(model, gate, snr_gamma=5.0)
        for seed in range(3):
            with Ops() as ops:
                objective(a_batch(model, seed, kept=True), a_batch(model, seed + 3)).backward()
            steps.append(ops.seen)
            for parameter in parameters:
                parameter.grad = None
    assert steps[0] >= steps[1] == steps[2]  # the first also makes the base's table of noise levels
    assert sum(steps[2].values()) > 1000 and "aten._local_scalar_dense.default" not in steps[0]


class Interruption(BaseException):
    """As Cog raises it for a cancelled training."""


def test_an_interruption_that_comes_as_a_tensor_is_freed_is_heard(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, free, freed = ctypes.c_ulong(threading.get_ident()), cost._LiveBytes._free, list[int]()

    def cancelled(live: Any, size: int) -> None:
        free(live, size)
        freed.append(size)
        if len(freed) == 1:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Interruption))

    monkeypatch.setattr(cost._LiveBytes, "_free", cancelled)
    with pytest.raises(Interruption):
        step_memory(*real_step("sdxl", bases, 64, 4, (1, 1)), dtype=torch.bfloat16, checkpointing=False)
