"""From encoded examples to batches. A batch's number alone decides which examples, what noise and which noise levels.

Knows no model and no optimiser.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klora.models.family import Conditioning
from klora.training.buckets import batches
from klora.training.cache import Example, View, keyed_generator
from klora.training.config import TrainConfig
from klora.training.objective import Batch, draw_noise, draw_times

FIXED_POINTS = 8  # (example, noise, noise level) at which the loss is compared over the run


@dataclass(frozen=True)
class Material:
    """What is trained on. class_examples: of pictures that the base drew; texts: {caption: its conditioning}."""

    examples: Sequence[Example]
    class_examples: Sequence[Example]
    texts: Mapping[str, Conditioning]


class Draw:
    """Batches by number, on a device. times: the base's distribution of noise levels, a key of objective.TIMES, for
    timestep_sampling "auto"."""

    def __init__(self, material: Material, config: TrainConfig, times: str, device: torch.device) -> None:
        self.texts = material.texts
        self._material = material
        self._config, self._device = config, device
        self._law = times if config.timestep_sampling == "auto" else config.timestep_sampling
        self._examples = _Deck(material.examples, config)
        self._class_examples = _Deck(material.class_examples, config)

    def batch(self, number: int) -> Batch:
        """The batch of this number, from 0."""
        return self._batch(self._examples[number], "draw", number)

    def class_batch(self, number: int) -> Batch | None:
        """The batch of class pictures that goes with the batch of this number; None where there are none."""
        return self._batch(self._class_examples[number], "class", number) if self._material.class_examples else None

    def fixed(self) -> Iterator[Batch]:
        """FIXED_POINTS batches of one example, the same at every step: noise levels from 0 to 1, the examples in
        turn."""
        for point in range(FIXED_POINTS):
            example = self._material.examples[point % len(self._material.examples)]
            view, generator = example.views[0], keyed_generator(self._config.seed, "fixed", point)
            latents = _sampled(view, generator)[None]
            times = torch.tensor([(point + 0.5) / FIXED_POINTS])
            conditioning = self._conditioning([example.caption], [view])
            noise = draw_noise(latents, 0, generator)
            yield Batch(latents, noise, times, conditioning, _masks([view])).to(self._device)

    def _batch(self, examples: Sequence[Example], kind: str, number: int) -> Batch:
        config, generator = self._config, keyed_generator(self._config.seed, kind, number)
        views = [example.views[int(torch.randint(len(example.views), (), generator=generator))] for example in examples]
        latents = torch.stack([_sampled(view, generator) for view in views])
        noise = draw_noise(latents, config.noise_offset, generator)
        times = draw_times(self._law, latents, generator)
        dropped = torch.rand(len(examples), generator=generator) < config.caption_dropout_rate
        captions = ["" if drop else example.caption for drop, example in zip(dropped, examples, strict=True)]
        kept = None
        if config.prior_preservation == "output":
            kept = self._conditioning([config.kept_caption(example.caption) for example in examples], views)
        batch = Batch(latents, noise, times, self._conditioning(captions, views), _masks(views), kept)
        return batch.to(self._device)

    def _conditioning(self, captions: Sequence[str], views: Sequence[View]) -> dict[str, Tensor]:
        texts = [self.texts[caption] for caption in captions]
        names = [name for name in texts[0] if not name.startswith("negative")]
        parts = {name: _rows([text[name] for text in texts], self.texts[""][name]) for name in names}
        return parts | {"time_ids": torch.stack([view.time_ids for view in views])}


def _rows(parts: Sequence[Tensor], blank: Tensor) -> Tensor:
    """Parts [1, T, ...] as rows of one tensor; shorter ones are padded with blank, the encoding of the empty prompt."""
    length = max(part.shape[1] for part in parts)
    padding = ([blank] * ((length - part.shape[1]) // blank.shape[1]) for part in parts)
    return torch.cat([torch.cat([part, *blanks], dim=1) for part, blanks in zip(parts, padding, strict=True)])


class _Deck:
    """The examples of each batch by its number, which counts on through the epochs: these have equally many batches.
    Only one epoch's plan is kept."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig) -> None:
        self._all, self._config = examples, config
        self._epoch = 0
        self._planned = self._plan(0)

    def __getitem__(self, number: int) -> list[Example]:
        epoch, place = divmod(number, len(self._planned))
        if epoch != self._epoch:
            self._epoch, self._planned = epoch, self._plan(epoch)
        return [self._all[index] for index in self._planned[place]]

    def _plan(self, epoch: int) -> list[list[int]]:
        sizes = [example.size for example in self._all]
        return batches(sizes, self._config.batch_size, seed=self._config.seed, epoch=epoch)


def _sampled(view: View, generator: torch.Generator) -> Tensor:
    """Latents [C, H/8, W/8], a sample of the view's posterior."""
    mean, std = view.posterior
    return mean + std * torch.randn(mean.shape, generator=generator)


def _masks(views: Sequence[View]) -> Tensor | None:
    masks = [view.mask for view in views if view.mask is not None]
    return torch.stack(masks) if masks else None
