"""The loss: each of its parts against the formula, or against the same thing written out by hand."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import diffusers
import pytest
import torch
from torch import Tensor, nn

from klora.lora import LowRank
from klora.models import FAMILIES, load_model
from klora.models.family import Family, Prediction
from klora.models.linears import linear_shapes
from klora.training.objective import Batch, Objective, draw_noise, draw_times, errors, shifted
from klora.training.trainable import trainable
from test_folder import tiny
from test_folder.families.painting import CPU, seeded
from test_folder.tiny import BASES

LEVELS = torch.tensor([0.02, 0.2, 0.6, 0.95])
same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, bases: Path) -> Family:
    return load_model(request.param, bases / BASES[request.param], CPU, parts=("denoiser",))


def a_batch(model: Family, seed: int = 0, times: Tensor = LEVELS[1:3], kept: bool = False) -> Batch:
    """Of random numbers, in the tiny models' widths."""
    generator, count = seeded(seed), len(times)
    channels, width = (4, 64) if model.component == "unet" else (16, 32)
    latents, noise = torch.randn(2, count, channels, 8, 4, generator=generator)
    embeds, pooled = (torch.randn(2, count, *size, generator=generator) for size in ((5, width), (32,)))
    parts = zip(embeds, pooled, torch.randint(64, (2, count, 6), generator=generator).float(), strict=True)
    ours, other = (dict(zip(("prompt_embeds", "pooled_prompt_embeds", "time_ids"), p, strict=True)) for p in parts)
    return Batch(latents, noise, times, ours, kept=other if kept else None)


@contextmanager
def lent(model: Family, trained: bool = True) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """(the gate, the parameters) of a LoRA lent to the denoiser; one that is not trained has B = 0."""
    drawn = tiny.random_lora(linear_shapes(model.denoiser), 2, seed=0)
    layers = {n: LowRank(nn.Parameter(A), nn.Parameter(B if trained else B * 0)) for n, (A, B) in drawn.items()}
    with trainable(model.denoiser.requires_grad_(False), layers) as gate:
        yield gate, [factor for pair in layers.values() for factor in (pair.A, pair.B)]


def plain(model: Family, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(*model.predict(*batch[:4])[:2])


@pytest.mark.parametrize("value", [None, 1e-3, 1.0, "drawn"])
def test_an_error_is_the_weighted_mean_over_cells_and_nothing_is_learnt_where_the_mask_is_0(value: object) -> None:
    """So that a mask which is the same everywhere changes nothing."""
    (guess, target), drawn = torch.randn(2, 3, 4, 6, 5, generator=seeded()), torch.rand(3, 1, 6, 5, generator=seeded())
    mask = drawn * (drawn > 0.4) if value == "drawn" else torch.full_like(drawn, value or 1)
    total, weight = torch.zeros(3), torch.zeros(3)
    for n, c, y, x in product(*map(range, guess.shape)):
        total[n] += mask[n, 0, y, x] * (guess[n, c, y, x] - target[n, c, y, x]) ** 2
        weight[n] += mask[n, 0, y, x]
    error = errors(Prediction(guess.requires_grad_(), target, total, total), mask if value else None)
    same(error, total / weight)
    [learnt] = torch.autograd.grad(error.sum(), guess)
    assert torch.equal(learnt != 0, (mask > 0).expand_as(learnt))


@pytest.mark.parametrize("kind", ["noise", "v", "flow"])
def test_min_snr_weighs_the_error_of_the_clean_latents(bases: Path, tmp_path: Path, kind: str) -> None:
    """min(snr, gamma) / snr where noise is predicted, / (snr + 1) where v is, * times^2 where a flow's velocity is."""
    family = "flux" if kind == "flow" else "sdxl"
    base = shutil.copytree(bases / BASES[family], tmp_path / "base")
    if kind == "v":
        settings = base / "scheduler" / "scheduler_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prediction_type": "v_prediction"}))
    model, gamma = load_model(family, base, CPU, parts=("denoiser",)), 3.0
    seen = model.predict(*a_batch(model, times=LEVELS)[:4])
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[(LEVELS * 1000).long()]
    snr = ((1 - LEVELS) / LEVELS) ** 2 if kind == "flow" else kept / (1 - kept)
    gain = {"noise": snr, "v": snr + 1, "flow": 1 / LEVELS**2}[kind]
    assert snr.max() > gamma > snr.min()  # so that both sides of it are seen
    same(errors(seen, None, gamma), errors(seen) * snr.clamp(max=gamma) / gain, rtol=1e-4)


LAWS = {  # from a quantile's share to the quantile
    "uniform": lambda share: share,
    "logit_normal": lambda share: torch.special.ndtri(share).sigmoid(),
    "shift": lambda share: (torch.special.ndtri(share) + math.log(1.878)).sigmoid(),  # the logit moves by mu
    "content": lambda share: 1 - (1 - share) ** 3,
    "style": lambda share: share**3,
}


@pytest.mark.parametrize("law", LAWS)
def test_times_follow_their_law_and_the_generator_alone(law: str) -> None:
    """At 512 px. 0.015: four standard deviations."""
    times, again = (draw_times(law, torch.zeros(1).expand(20_000, 4, 64, 64), seeded()) for _ in range(2))
    assert torch.equal(times, again)
    shares = torch.arange(0.05, 1, 0.05)
    below = (times[:, None] <= LAWS[law](shares)).float().mean(0)
    torch.testing.assert_close(below, shares, rtol=0, atol=0.015)
    assert times.shape == (20_000,) and times.min() >= 0 and times.max() <= 1


@pytest.mark.parametrize(("side", "published"), [(512, 1.878), (768, 2.332), (1024, 3.158)])
def test_shift_is_the_published_one_and_the_schedulers(side: int, published: float) -> None:
    tokens, sigmas = (side // 16) ** 2, torch.linspace(1, 1 / 28, 28).tolist()
    assert float(shifted(torch.tensor(0.5), tokens).logit().exp()) == pytest.approx(published, abs=5e-4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=sigmas, mu=0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    same(shifted(torch.tensor([*sigmas, 0.0]), tokens), scheduler.sigmas)
    grid = shifted(torch.linspace(0, 1, 100), tokens)
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_noise_has_unit_variance_about_a_channels_mean_and_the_means_have_the_offsets(offset: float) -> None:
    """The mean of 16 unit cells has variance 1/16 by itself."""
    noise, again = (draw_noise(torch.zeros(4000, 8, 4, 4), offset, seeded()) for _ in range(2))
    assert torch.equal(noise, again)
    assert float(noise.var(dim=(2, 3)).mean()) == pytest.approx(1, rel=0.02)
    for axis in (0, 1):  # neither an example's channels nor a channel's examples share theirs
        assert float(noise.mean(dim=(2, 3)).var(axis).mean()) == pytest.approx(offset**2 + 1 / 16, rel=0.04)


def test_keeping_the_outputs_costs_an_untrained_lora_nothing(model: Family) -> None:
    batch = a_batch(model, kept=True)
    with lent(model, trained=False) as (gate, _):
        assert Objective(model, gate, prior_weight=9.0)(batch) == Objective(model, gate)(batch._replace(kept=None))


@pytest.mark.parametrize("opening", [1.0, 0.5])
def test_keeping_the_outputs_pulls_the_lora_towards_the_base_which_stays(model: Family, opening: float) -> None:
    batch, grads = a_batch(model, kept=True), []
    model.denoiser.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    with lent(model) as (gate, parameters):
        gate.fill_(opening)
        loss = Objective(model, gate, prior_weight=0.7)(batch)
        assert (gate == opening).all() and grads == [False, True, True]
        seen = torch.autograd.grad(loss, parameters)
        gate.zero_()
        base = model.predict(*batch[:3], batch.kept).predicted.detach()
        gate.fill_(opening)
        naive = plain(model, batch) + 0.7 * (model.predict(*batch[:3], batch.kept).predicted - base).square().mean()
        same(loss, naive)
        same(seen, torch.autograd.grad(naive, parameters), rtol=1e-4, atol=1e-6)


def test_the_gate_opens_again_when_the_base_fails(model: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "predict", Mock(side_effect=KeyboardInterrupt))
    with lent(model) as (gate, _):
        gate.fill_(0.5)
        with pytest.raises(KeyboardInterrupt):
            Objective(model, gate)(a_batch(model, kept=True))
        assert (gate == 0.5).all()


def test_pictures_of_the_class_count_by_their_weight_and_under_their_own_conditioning(model: Family) -> None:
    ours, theirs = a_batch(model, seed=1), a_batch(model, seed=2, times=LEVELS[:1])
    with lent(model) as (gate, _), torch.no_grad():
        same(Objective(model, gate, prior_weight=0.3)(ours, theirs), plain(model, ours) + 0.3 * plain(model, theirs))


def test_recomputed_activations_give_the_same_gradients(model: Family) -> None:
    batch, gradients, runs = a_batch(model), [], []
    block = next(part for name, part in model.denoiser.named_modules() if name.endswith("transformer_blocks.0"))
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    for switch in (model.denoiser.disable_gradient_checkpointing, model.denoiser.enable_gradient_checkpointing):
        switch()
        with lent(model) as (gate, parameters):
            gradients.append(torch.autograd.grad(Objective(model, gate)(batch), parameters))
    assert len(runs) == 3  # the last of them in the backward pass
    same(gradients[1], gradients[0], atol=1e-5)


def test_flux_reads_squares_of_two_by_two_cells_row_by_row_and_puts_them_back(bases: Path) -> None:
    """b c (h ph) (w pw) -> b (h w) (c ph pw), in einops' language."""
    flux = load_model("flux", bases / "flux-dev", CPU, parts=("denoiser",))
    batch, packed = a_batch(flux), []

    def echo(_: nn.Module, __: object, inputs: dict[str, Tensor], output: object) -> object:
        return type(output)(sample=packed.append(inputs["hidden_states"]) or packed[0])

    flux.denoiser.register_forward_hook(echo, with_kwargs=True)
    seen = flux.predict(*batch[:4]).predicted
    mixed = torch.stack([(1 - t) * x + t * n for x, n, t in zip(*batch[:3], strict=True)])
    naive = torch.empty(2, 4 * 2, 16 * 4)
    for h, w, c, ph, pw in product(range(4), range(2), range(16), range(2), range(2)):
        naive[:, h * 2 + w, c * 4 + ph * 2 + pw] = mixed[:, c, h * 2 + ph, w * 2 + pw]
    same(packed[0], naive)
    same(seen, mixed)


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_flux_is_told_where_its_squares_lie_and_which_guidance(bases: Path, guidance: float | None) -> None:
    """1 unless something else is asked for: what no distillation has changed."""
    flux, told = load_model("flux", bases / "flux-dev", CPU, parts=("denoiser",)), dict[str, Tensor]()
    batch = a_batch(flux)
    flux.denoiser.register_forward_pre_hook(lambda _, __, inputs: told.update(inputs), with_kwargs=True)
    asked = {} if guidance is None else {"guidance": torch.full((2,), guidance)}
    flux.predict(*batch[:3], dict(batch.conditioning) | asked)
    assert told["img_ids"].tolist() == [[0, row, column] for row, column in product(range(4), range(2))]
    assert told["guidance"].tolist() == [guidance or 1.0] * 2
