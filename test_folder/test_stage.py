"""A stage of the toy bases' training: it goes on from where it was, and a GPU's recording learns what a step would."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.stage import Recorded, Stage, Task


def test_a_stage_goes_on_from_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In as many steps in all, to the same weights."""
    modules = [torch.nn.Linear(3, 3) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())

    def trained(name: str, module: torch.nn.Module, stop: int) -> None:
        own = Stage(Task("base", 6, 1, 0.1, torch.device("cpu"), tmp_path, tmp_path), name, {"module": module})
        for chance in own.run():
            if own.step == stop:
                own.save()
                return
            own.learn(lambda x: {"loss": module(x).square().sum()}, x=torch.rand(1, 3, generator=chance))
        own.finish()

    trained("whole", modules[0], 6)
    trained("parts", modules[1], 2)
    torch.nn.init.zeros_(modules[1].weight)  # what is gone on with is what the file holds
    trained("parts", modules[1], 6)
    assert "parts: going on from step 2" in capsys.readouterr().out
    assert torch.equal(modules[0].weight, modules[1].weight)


def test_a_part_may_learn_more_slowly(tmp_path: Path) -> None:
    parts = {"quick": torch.nn.Linear(1, 1), "slow": torch.nn.Linear(1, 1)}
    stage = Stage(Task("base", 6, 1, 0.1, torch.device("cpu"), tmp_path, tmp_path), "parts", parts, {"slow": 0.2})
    assert [group["initial_lr"] for group in stage.optimizer.param_groups] == pytest.approx([0.1, 0.02])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_what_is_recorded_says_of_every_input_what_the_lesson_says(device: str) -> None:
    """Also after the weights have changed, where they are."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)).to(device)
    parameters, inputs = list(module.parameters()), [torch.randn(5, 4, device=device) for _ in range(3)]

    def lesson(x: Tensor) -> dict[str, Tensor]:
        return {"loss": module(x).square().mean(), "mean": module(x).mean()}

    recorded = Recorded(parameters)
    for x in inputs:
        facts = recorded.measure(lesson, {"x": x})
        asked = lesson(x)
        wanted = torch.autograd.grad(asked["loss"], parameters)
        assert all(torch.allclose(p.grad, gradient, atol=1e-6) for p, gradient in zip(parameters, wanted, strict=True))
        assert all(torch.allclose(facts[name], value, atol=1e-6) for name, value in asked.items())
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(0.1 * parameter.grad)
