"""A fusion baked into one LoRA: against dense sums of what K-LoRA applies."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from klora import Fusion, LoRA, LowRank, Schedule, attached
from klora.export import baked
from klora.lora import Plan
from test_folder.export.exporting import OWN, STEPS, dense


def average(
    fusion: Fusion, wins: Tensor, steps: Sequence[int], scales: tuple[float, float]
) -> dict[str, tuple[Tensor, set[str]]]:
    """{layer: (the mean of what is applied, the LoRAs that are ever applied)}, a step at a time."""
    found = {}
    for index, name in enumerate(fusion.layers):
        total, seen = 0.0, set()
        for step in steps:
            role = "content" if wins[step, index] else "style"
            pair, scale = getattr(fusion, role).get(name), scales[role == "style"]
            if pair is not None and scale:
                total, seen = total + scale * dense(pair) / len(steps), seen | {role}
        found[name] = total, seen
    return found


@pytest.mark.parametrize("steps", [None, (0, 1), (2, 7), (7, 8)], ids=str)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, -0.5), (1.3, 0.0), (0.0, 1.0)], ids=str)
def test_a_layer_is_the_mean_of_what_is_applied(
    fusion: Fusion, wins: Tensor, steps: tuple[int, int] | None, scales: tuple[float, float]
) -> None:
    seen = baked(fusion, wins, *scales, steps)
    for name, (meant, acting) in average(fusion, wins, range(*(steps or (0, STEPS))), scales).items():
        if acting:
            assert (dense(seen[name]) - meant).abs().max() < 1e-6 * meant.abs().max(), name
            assert seen[name].rank == sum({"content": 6, "style": 5}[role] for role in acting), name
        else:
            assert name not in seen
    assert OWN["content"] in seen or OWN["style"] in seen


def test_text_encoders_are_the_sum_at_the_scales(fusion: Fusion, wins: Tensor) -> None:
    """Whatever the steps: they run before the first."""
    content, style = (part.text_encoders["text_encoder"] for part in (fusion.content, fusion.style))
    for steps in (None, (0, 1)):
        seen = baked(fusion, wins, 0.5, -2.0, steps).text_encoders["text_encoder"]
        assert seen.keys() == {"a", "b", "c"}
        for name, pair in seen.items():
            like = content.get(name) or style.get(name)
            meant = 0.5 * dense(content.get(name), like) - 2.0 * dense(style.get(name), like)
            assert (dense(pair) - meant).abs().max() < 1e-6
    assert baked(fusion, wins, 0.0, 1.0).text_encoders["text_encoder"].keys() == {"b", "c"}
    bare = replace(fusion, content=LoRA(fusion.content.layers))
    assert baked(bare, wins, 1.0, 0.0).text_encoders == {}


def test_where_no_layer_flips_the_weights_are_those_of_k_lora(fusion: Fusion) -> None:
    """At each of its steps, by the engine that writes weights."""
    schedule = Schedule.from_pattern("s")
    module = nn.ModuleDict({name: nn.Linear(pair.A.shape[1], len(pair.B)) for name, pair in merged(fusion).items()})
    wins = fusion.content_wins(schedule, STEPS)
    steps = next((i, i + 2) for i in range(STEPS - 1) if torch.equal(wins[i], wins[i + 1]))
    alone = weights_with(module, Plan.constant((baked(fusion, wins, 0.8, 1.2, steps),), (1.0,)), 0)
    everywhere = weights_with(module, Plan.constant((baked(fusion, wins, 0.8, 1.2),), (1.0,)), 0)
    plan = fusion.plan(schedule, steps=STEPS, content_scale=0.8, style_scale=1.2)
    for step in range(*steps):
        meant = weights_with(module, plan, step)
        assert max((alone[name] - meant[name]).abs().max() for name in meant) < 1e-6
        assert max((everywhere[name] - meant[name]).abs().max() for name in meant) > 1e-2


def merged(fusion: Fusion) -> dict[str, LowRank]:
    return {**fusion.content, **fusion.style}


def weights_with(module: nn.ModuleDict, plan: Plan, step: int) -> dict[str, Tensor]:
    with torch.no_grad(), attached(module, plan, engine="merged") as gate:
        gate.set_step(step)
        return {name: linear.weight.clone() for name, linear in module.items()}
