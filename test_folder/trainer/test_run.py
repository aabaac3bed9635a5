"""A run by itself: its rates, its gradients, what its file says."""

import ctypes
import json
import math
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import klora.interruptible
from klora.errors import RequestError
from klora.lora import LowRank
from klora.training.config import TrainConfig
from klora.training.run import Run, new_run, saved_step


def a_run(config: TrainConfig) -> Run:
    factors = (nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2)))
    return new_run({"layer": LowRank(*factors)}, config, learning_rate=1e-2, scale=1.0)


def advanced(run: Run, size: float = 1.0, max_grad_norm: float = 1.0) -> float:
    """The rate of a step by gradients of this size."""
    [group] = run.optimizer.param_groups
    rate: float = group["lr"]
    for parameter in run.parameters:
        parameter.grad = torch.full_like(parameter, size)
    run.advance(max_grad_norm)
    return rate


LAWS: dict[str, Callable[[float], float]] = {  # from the share of the steps after the warm-up to that of the rate
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1,
}


@pytest.mark.parametrize("law", LAWS)
def test_a_run_that_is_given_more_steps_follows_their_law_from_the_first_of_them(law: str, tmp_path: Path) -> None:
    short, long = (TrainConfig(steps=steps, lr_scheduler=law, lr_warmup_steps=1) for steps in (4, 8))
    first, resumed, whole = a_run(short), a_run(long), a_run(long)
    for _ in range(4):
        advanced(first)
    first.save(tmp_path / "run.safetensors")
    resumed.load(tmp_path / "run.safetensors")
    rates = [advanced(whole) for _ in range(8)]
    assert rates == pytest.approx([0, *(1e-2 * LAWS[law](step / 7) for step in range(7))])
    assert [advanced(resumed) for _ in range(4)] == rates[4:]
    assert saved_step(tmp_path / "run.safetensors") == 4


def test_a_learning_rate_means_as_much_to_adafactor_as_to_adamw_for_what_begins_at_nothing() -> None:
    moved = {}
    for optimizer in ("adamw", "adafactor"):
        run = a_run(TrainConfig(optimizer=optimizer, weight_decay=0.0))
        for parameter in run.parameters:
            nn.init.zeros_(parameter)
        advanced(run)
        moved[optimizer] = torch.cat([parameter.detach().flatten() for parameter in run.parameters])
    torch.testing.assert_close(moved["adafactor"], moved["adamw"])
    assert float(moved["adamw"][0]) == pytest.approx(-1e-2)


FACTORS = {"step": 1, "state": {"items": [["parameters", [{"tensor": "A"}, {"tensor": "B"}]], ["optimizer", None]]}}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ('{"step": 1e999, "state": 1}', "cannot convert float infinity"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('{"state": 1}', "'step'"),
        ('{"step": 1}', "'state'"),
        (json.dumps(FACTORS).replace('"B"', '"A"'), "The size of tensor a"),
        (json.dumps(FACTORS), "'NoneType' object has no attribute 'copy'"),
    ],
    ids=["endless", "deep", "no step", "no state", "another size", "no optimizer"],
)
def test_a_file_that_is_no_runs_is_refused_in_a_sentence(told: str, said: str, tmp_path: Path) -> None:
    path, run = tmp_path / "run.safetensors", a_run(TrainConfig(steps=4))
    save_file({"A": torch.ones(2, 3), "B": torch.ones(4, 2)}, path, {"run": told})
    with pytest.raises(RequestError, match=rf"^resume_from cannot be taken up: {said}.*\. Expected the tar of a"):
        run.step = saved_step(path)
        run.load(path)


def test_gradients_are_scaled_down_to_the_norm_and_a_norm_of_0_does_not_clip() -> None:
    gradients = {}
    for norm in (0, 1000, 0.5):
        run = a_run(TrainConfig(steps=1))
        advanced(run, size=1.0, max_grad_norm=norm)
        gradients[norm] = run.optimizer.state[run.parameters[0]]["exp_avg"]
        assert all(parameter.grad is None for parameter in run.parameters)
    assert torch.equal(gradients[0], gradients[1000]) and gradients[0].all()
    torch.testing.assert_close(gradients[0.5], gradients[0] * 0.5 / 14**0.5)


def test_where_a_mean_is_kept_it_is_the_result() -> None:
    run, passed = a_run(TrainConfig(steps=2, ema_decay=0.1)), []
    for _ in range(2):
        advanced(run)
        passed.append([parameter.detach().clone() for parameter in run.parameters])
    first, last = passed
    result = run.lora()["layer"]
    for mean, before, now in zip((result.A, result.B), first, last, strict=True):
        torch.testing.assert_close(mean, 0.1 * before + 0.9 * now, rtol=1e-6, atol=0)
        assert not torch.equal(mean, now)


def test_a_run_knows_whether_it_is_numbers() -> None:
    run = a_run(TrainConfig(steps=2))
    assert run.finite
    with torch.no_grad():
        run.parameters[1][0, 0] = torch.inf
    assert not run.finite


class Interrupted(dict[str, LowRank]):
    """Layers at which nobody can look."""

    def values(self) -> Any:
        raise KeyboardInterrupt


def test_a_run_is_not_whole_while_the_mean_is_in_its_place_nor_where_it_was_left_there() -> None:
    run = a_run(TrainConfig(steps=3, ema_decay=0.5))
    for _ in range(2):
        advanced(run)
    own = [parameter.clone() for parameter in run.parameters]
    with run.averaged():
        assert not run.consistent and not torch.equal(own[0], run.parameters[0])
    assert run.consistent and all(map(torch.equal, own, run.parameters))
    with pytest.raises(KeyboardInterrupt), run.averaged():
        run.layers = Interrupted(run.layers)
    assert not run.consistent


def as_cog_does() -> None:
    """Raise in the main thread, from whichever this is."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


@pytest.mark.parametrize(
    ("interrupt", "times"),
    [(interrupt_main, 1), (as_cog_does, 1), (as_cog_does, 2)],
    ids=["signal", "cog", "cog twice"],
)
def test_a_step_that_is_interrupted_is_taken_to_its_end(
    interrupt: Callable[[], None], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as if nothing had been."""
    monkeypatch.setattr(klora.interruptible, "LOOK", 0.001)
    config = TrainConfig(steps=4, ema_decay=0.9, lr_scheduler="cosine")
    run, undisturbed = a_run(config), a_run(config)
    step = run.optimizer.step

    def interrupted(*given: Any) -> None:
        for _ in range(times):
            interrupt()
            time.sleep(0.05)
        step(*given)

    for each in (run, undisturbed):
        advanced(each)
    run.optimizer.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        advanced(run)
    advanced(undisturbed)
    assert run.consistent and run.step == 2
    for each, name in ((run, "run"), (undisturbed, "undisturbed")):
        each.save(tmp_path / name)
    assert (tmp_path / "run").read_bytes() == (tmp_path / "undisturbed").read_bytes()
