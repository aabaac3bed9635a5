"""How the base is held for training: the fastest way that fits into what is free."""

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from klora.errors import RequestError
from klora.models import load_model
from klora.models.family import Posterior
from klora.models.linears import linear_shapes
from klora.training import memory
from klora.training.cache import Example, View
from klora.training.config import TrainConfig
from klora.training.cost import step_memory
from klora.training.draw import Material
from klora.training.loop import new_layers
from klora.training.memory import TRAINED_BYTES, WORKSPACE_BYTES, Mode, choose, mode_for
from test_folder.test_objective import a_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # choose looks at the type alone
BF16, FP32 = torch.bfloat16, torch.float32
GB = 10**9
WEIGHTS = {"sdxl": int(2.567 * GB), "flux": int(11.9 * GB)}
TRAINED = {"sdxl": int(0.012 * GB), "flux": int(0.019 * GB)}
PEAKS = {"sdxl": {False: 5.7, True: 0.55}, "flux": {False: 23.6, True: 2.4}}  # GB at 1024 px, of bf16


@pytest.fixture(autouse=True)
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.fixture
def bitsandbytes(without_bitsandbytes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something of this name that can be imported."""
    (tmp_path / "bitsandbytes.py").touch()
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def chosen(family: str, free: float, device: torch.device = CUDA, **settings: Any) -> Mode:
    """free: GB."""

    def peak_bytes(dtype: torch.dtype, checkpointing: bool) -> int:
        return int(PEAKS[family][checkpointing] * GB * dtype.itemsize / 2)

    config = TrainConfig(compile="off", **settings)
    return choose(config, device, WEIGHTS[family], TRAINED[family], peak_bytes, int(free * GB))


# In bf16, GB: SDXL needs 14.25 with activations kept, 9.10 with them recomputed; FLUX.1 50.9 and 29.7.
@pytest.mark.parametrize(
    ("family", "free", "recompute"),
    [("sdxl", 10, True), ("sdxl", 12, True), ("sdxl", 24, False), ("sdxl", 48, False), ("sdxl", 80, False),
     ("sdxl", 141, False), ("flux", 24, True), ("flux", 48, True), ("flux", 80, False), ("flux", 141, False)],
)  # fmt: skip
def test_activations_are_kept_wherever_they_fit(family: str, free: float, recompute: bool) -> None:
    assert chosen(family, free) == Mode(BF16, None, recompute, False)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(
    ("free", "mode"),
    [(80, (BF16, None, False)), (48, (BF16, None, True)), (32, (BF16, "int8", True)), (24, (BF16, "int8", True)),
     (16, (BF16, "nf4", True)), (8, (BF16, "nf4", True))],
)  # fmt: skip
def test_flux_is_quantised_where_it_would_not_fit_and_a_library_can(free: float, mode: tuple[Any, ...]) -> None:
    """int8 needs 19.0 GB with activations recomputed, nf4 13.1."""
    assert chosen("flux", free) == Mode(*mode, False)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_cpu_computes_in_fp32_and_is_never_quantised() -> None:
    """SDXL in fp32 needs 10.27 + 0.19 + 3.22 GB, and 11.4 of activations or 1.1."""
    modes = {free: chosen("sdxl", free, CPU) for free in (141, 24, 4)}
    assert modes == {free: Mode(FP32, None, free < 28, False) for free in modes}


def test_a_tenth_of_the_memory_stays_free() -> None:
    needed = 2 * WEIGHTS["sdxl"] / GB + 16 * TRAINED["sdxl"] / GB + (3 << 30) / GB + PEAKS["sdxl"][False]
    assert not chosen("sdxl", needed / 0.9 + 0.001).checkpointing
    assert chosen("sdxl", needed / 0.9 - 0.001).checkpointing


@pytest.mark.parametrize(("setting", "recompute"), [("on", True), ("off", False)])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", BF16), ("fp32", FP32)])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("free", [1, 141])
def test_what_is_asked_for_is_done_fitting_or_not_and_then_nothing_is_measured(
    setting: str, recompute: bool, precision: str, dtype: torch.dtype, device: torch.device, free: int
) -> None:
    config = TrainConfig(precision=precision, gradient_checkpointing=setting, compile="on")
    peak_bytes = Mock(side_effect=AssertionError)
    assert choose(config, device, WEIGHTS["flux"], 1, peak_bytes, free * GB) == Mode(dtype, None, recompute, True)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(
    ("free", "measured"),
    [(141, [False]), (48, [False, True]), (32, [False, True]), (24, [False, True]), (12, [False, True]), (1, [True])],
)
def test_nothing_is_measured_twice_nor_where_the_weights_alone_do_not_fit(free: float, measured: list[bool]) -> None:
    """It takes seconds at the beginning of a training."""
    calls = list[bool]()

    def peak_bytes(dtype: torch.dtype, checkpointing: bool) -> int:
        calls.append(checkpointing)
        return PEAKS["flux"][checkpointing] * GB

    choose(TrainConfig(), CUDA, WEIGHTS["flux"], TRAINED["flux"], peak_bytes, int(free * GB))
    assert calls == measured


@pytest.mark.parametrize(("setting", "free", "recompute"), [("auto", 10, True), ("auto", 80, False), ("on", 80, True)])
def test_a_precision_that_is_asked_for_leaves_the_activations_to_be_chosen(
    setting: str, free: float, recompute: bool
) -> None:
    assert chosen("sdxl", free, precision="fp32", gradient_checkpointing=setting) == Mode(FP32, None, recompute, False)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantising_without_the_library_is_refused_in_a_sentence_and_with_it_done_however_much_is_free(
    precision: str, request: pytest.FixtureRequest
) -> None:
    expected = rf"^precision is {precision},? and bitsandbytes is not installed\. Expected bf16 or fp32\.$"
    with pytest.raises(RequestError, match=expected):
        chosen("flux", 141, precision=precision)
    request.getfixturevalue("bitsandbytes")
    assert chosen("flux", 141, precision=precision) == Mode(BF16, precision, False, False)


@pytest.mark.parametrize(
    ("device", "setting", "steps", "compiled"),
    [(CUDA, "auto", 300, True), (CUDA, "auto", 299, False), (CPU, "auto", 10000, False), (CUDA, "off", 10000, False),
     (CPU, "on", 1, True)],
    ids=str,
)  # fmt: skip
def test_blocks_are_compiled_where_it_pays(device: torch.device, setting: str, steps: int, compiled: bool) -> None:
    assert choose(TrainConfig(compile=setting, steps=steps), device, 1, 1, lambda *_: 0, GB).compiled == compiled


@pytest.mark.parametrize(("kept", "passes"), [("none", 1), ("output", 2), ("class_images", 2)])
def test_a_step_is_measured_at_the_largest_size_by_a_whole_batch_and_with_the_pass_that_keeps_the_prior(
    bases: Path, monkeypatch: pytest.MonkeyPatch, kept: str, passes: int
) -> None:
    """Where a little less is free, activations are recomputed; a base's first step also makes 20 KB of tables."""
    base = load_model("sdxl", bases / "sdxl", CPU, parts=())
    shapes, prompt = linear_shapes(base.denoiser), a_batch(base).conditioning
    means = [torch.zeros(4, height, width) for height, width in ((8, 8), (16, 8), (8, 8))]
    examples = [Example((View(Posterior(mean, mean), torch.zeros(6), None),), "", (64, 64)) for mean in means]
    step = step_memory(base, shapes, 3, (2, 4, 16, 8), prompt, dtype=FP32, checkpointing=False)
    weights = sum(weight.nbytes for weight in base.denoiser.float().parameters())
    trained = sum(pair.A.numel() + pair.B.numel() for pair in new_layers(shapes, 3, 0, CPU).values())
    needed = weights + trained * TRAINED_BYTES + WORKSPACE_BYTES + passes * step.peak_bytes
    config = TrainConfig(batch_size=2, prior_preservation=kept, class_word="dog")
    for spare, recompute in ((50_000, False), (-50_000, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=needed / 0.9 + spare: free)
        mode = mode_for(base, shapes, 3, Material(examples, (), {"": prompt}), config, CPU)
        assert mode == Mode(FP32, None, recompute, False)
