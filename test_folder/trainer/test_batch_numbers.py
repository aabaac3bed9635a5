"""A batch's number alone decides what is in it: which examples, with what noise, at what level."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from klora.models.family import Posterior
from klora.training.cache import Example, View
from klora.training.draw import Draw, Material
from klora.training.objective import Batch
from test_folder.trainer.material import CPU, config

TEXTS = {
    text: {"prompt_embeds": torch.full((1, 1, 1), float(number)), "negative_prompt_embeds": torch.zeros(1, 1, 1)}
    for number, text in enumerate(("", "a sbu dog", "a dog"))
}


def dealt(usual: str = "uniform", masked: bool = False, **settings: Any) -> Draw:
    """Of three examples and two of the class, whose cells are about their number, as are their masks and sizes; a batch
    has one."""
    cells, std = [torch.full((4, 2, 2), float(number)) for number in range(5)], torch.full((4, 2, 2), 0.05)
    views = [View(Posterior(mean, std), mean[0, 0, 0].expand(6), mean[:1] if masked else None) for mean in cells]
    examples = [Example((view,), "a sbu dog", (16, 16)) for view in views]
    return Draw(Material(examples[:3], examples[3:], TEXTS), config(**settings), usual, CPU)


def numbers(batches: Iterable[Batch]) -> list[int]:
    return [round(float(batch.latents.mean())) for batch in batches]


def test_noise_levels_follow_the_law_that_is_asked_for_or_else_the_bases() -> None:
    asked, usual, other = (
        dealt(law, timestep_sampling=given).batch(0).times
        for law, given in (("style", "content"), ("content", "auto"), ("style", "auto"))
    )
    assert torch.equal(asked, usual) and not torch.equal(usual, other)


def test_an_offset_shifts_channels_of_the_noise_and_not_the_points_at_which_the_loss_is_compared() -> None:
    plain, offset = dealt(), dealt(noise_offset=0.5)
    shift = offset.batch(0).noise - plain.batch(0).noise
    assert shift.abs().min() > 0 and torch.allclose(shift, shift[..., :1, :1])
    assert all(torch.equal(one.noise, two.noise) for one, two in zip(plain.fixed(), offset.fixed(), strict=True))


def test_the_loss_is_compared_at_even_noise_levels_of_the_examples_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klora.training.draw.FIXED_POINTS", 4)
    points = list(dealt().fixed())
    assert numbers(points) == [0, 1, 2, 0]
    assert [float(point.times) for point in points] == [0.125, 0.375, 0.625, 0.875]
    assert not torch.equal(points[0].noise, points[3].noise)


def test_mask_and_size_go_with_their_picture_also_where_the_loss_is_compared() -> None:
    dealer = dealt(masked=True)
    batches = [*dealer.fixed(), *(dealer.batch(number) for number in range(3))]
    masks = [batch.mask for batch in batches if batch.mask is not None]
    assert [mask.mean() for mask in masks] == numbers(batches) and {mask.shape for mask in masks} == {(1, 1, 2, 2)}
    sizes = [batch.conditioning["time_ids"].tolist() for batch in batches]
    assert sizes == [[[number] * 6] for number in numbers(batches)]


def test_every_epoch_has_an_order_and_draws_of_its_own_and_so_has_the_class() -> None:
    dealer = dealt(seed=3)
    ours, theirs = [dealer.batch(number) for number in range(18)], [dealer.class_batch(n) for n in range(18)]
    for shown, members in ((ours, [0, 1, 2]), ([batch for batch in theirs if batch], [3, 4])):
        found = numbers(shown)
        epochs = [found[start : start + len(members)] for start in range(0, 18, len(members))]
        assert all(sorted(epoch) == members for epoch in epochs) and len({*map(tuple, epochs)}) > 1
        assert len({batch.noise.numpy().tobytes() for batch in shown}) == 18
        spread = torch.cat([batch.latents - batch.latents.round() for batch in shown])
        assert len({tuple(part.flatten().tolist()) for part in spread}) == 18
        assert float(spread.std()) == pytest.approx(0.05, rel=0.15)
    assert not any(torch.equal(one.noise, two.noise) for one, two in zip(ours, theirs, strict=True) if two)
    assert torch.equal(dealer.batch(0).latents, ours[0].latents)
    others = [dealt(seed=4).batch(number) for number in range(18)]
    assert numbers(others) != numbers(ours) and not torch.equal(others[0].noise, ours[0].noise)


def test_what_is_to_stay_as_the_base_is_has_the_captions_without_the_trigger() -> None:
    batch = dealt(prior_preservation="output", class_word="dog", caption_dropout_rate=1.0).batch(0)
    assert batch.conditioning.keys() == {"prompt_embeds", "time_ids"}
    assert batch.conditioning["prompt_embeds"] == TEXTS[""]["prompt_embeds"]
    assert batch.kept is not None and batch.kept["prompt_embeds"] == TEXTS["a dog"]["prompt_embeds"]
    assert dealt().batch(0).kept is None
