"""A run by itself: its rates, its gradients, what its file says."""

from pathlib import Path

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("law", ["cosine", "linear", "constant"])
def test_a_run_that_is_given_more_steps_follows_their_law_from_the_first_of_them(law: str, tmp_path: Path) -> None:
    short, long = (TrainConfig(steps=steps, lr_scheduler=law, lr_warmup_steps=1) for steps in (4, 8))
    first, resumed, whole = a_run(short), a_run(long), a_run(long)
    for _ in range(4):
        advanced(first)
    first.save(tmp_path / "run.safetensors")
    resumed.load(tmp_path / "run.safetensors")
    rates = [advanced(whole) for _ in range(8)]
    assert [advanced(resumed) for _ in range(4)] == rates[4:]
    assert saved_step(tmp_path / "run.safetensors") == 4


def test_a_norm_of_0_does_not_clip() -> None:
    gradients = []
    for norm in (0, 1000):
        run = a_run(TrainConfig(steps=1))
        advanced(run, size=0.1, max_grad_norm=norm)
        gradients.append(run.optimizer.state[run.parameters[0]]["exp_avg"])
    assert torch.equal(*gradients) and gradients[0].all()


def test_a_run_knows_whether_it_is_numbers() -> None:
    run = a_run(TrainConfig(steps=2))
    assert run.finite
    advanced(run, size=torch.inf)
    assert not run.finite
