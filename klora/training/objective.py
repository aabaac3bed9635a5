"""The training loss, one for every family: noise levels, masks, weights, prior preservation.

A family contributes predict().   Shape legend: N examples, C channels, H and W in latent cells.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from klora.models.family import Conditioning, Family, Prediction

TIMES: Mapping[str, Callable[[int, Generator], Tensor]] = {
    "uniform": lambda count, generator: torch.rand(count, generator=generator),
    "logit_normal": lambda count, generator: torch.randn(count, generator=generator).sigmoid(),
    "shift": lambda count, generator: torch.randn(count, generator=generator).sigmoid(),  # and then shifted()
    "content": lambda count, generator: 1 - torch.rand(count, generator=generator) ** 3,
    "style": lambda count, generator: torch.rand(count, generator=generator) ** 3,
}
"""{distribution: function that draws noise levels}, in [0, 1], 1 being all noise: content favours noise, where layout
is decided, style what is nearly an image, where texture is."""


class Batch(NamedTuple):
    """The inputs of one forward pass, on the denoiser's device. latents, noise: float32 [N, C, H, W]; times: float32
    [N]; mask: float32 [N, 1, H, W] in [0, 1]; kept: conditioning under which the output is to stay the base's."""

    latents: Tensor
    noise: Tensor
    times: Tensor
    conditioning: Conditioning
    mask: Tensor | None = None
    kept: Conditioning | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), self)


class Objective(nn.Module):
    """The loss as a module, so that accelerate can run it on several processes. gate: what trainable() yields."""

    def __init__(self, model: Family, gate: Tensor, snr_gamma: float | None = None, prior_weight: float = 1.0) -> None:
        super().__init__()
        self.denoiser = model.denoiser
        self._predict, self._gate = model.predict, gate
        self._snr_gamma, self._prior_weight = snr_gamma, prior_weight

    def forward(self, batch: Batch, prior: Batch | None = None) -> Tensor:
        """The mean loss, float32 []: of the batch and, times prior_weight, of what preserves the prior.

        That is the loss of prior, a batch of class pictures, or under batch.kept the mean squared distance to the
        base's output. This is to be zero at every noise level and outside of the mask, too: without snr_gamma and mask.
        """
        # The base's pass comes first: it changes the gate in place, which the other passes keep for their gradients.
        inputs = (batch.latents, batch.noise, batch.times, batch.kept or {})
        base = self._base(*inputs) if batch.kept else None
        loss = self._errors(batch).mean()
        if base is not None:
            loss = loss + self._prior_weight * (self._predict(*inputs).predicted - base).square().mean()
        if prior is not None:
            loss = loss + self._prior_weight * self._errors(prior).mean()
        return loss

    def _errors(self, batch: Batch) -> Tensor:
        prediction = self._predict(batch.latents, batch.noise, batch.times, batch.conditioning)
        return errors(prediction, batch.mask, self._snr_gamma)

    @torch.no_grad()
    def _base(self, *inputs: Any) -> Tensor:
        """What the denoiser predicts without its LoRA."""
        gate = self._gate.clone()
        try:
            self._gate.zero_()
            return self._predict(*inputs).predicted
        finally:
            self._gate.copy_(gate)


def errors(prediction: Prediction, mask: Tensor | None = None, snr_gamma: float | None = None) -> Tensor:
    """Mean squared error of each example, float32 [N].

    mask: weights of the cells; divided by their mean, so that the learning rate means the same whatever the mask.
    snr_gamma: min-SNR (arXiv:2303.09556): the error of the clean latents is weighted with min(snr, snr_gamma).
    """
    squared = (prediction.predicted - prediction.target).square()
    if mask is not None:
        squared = squared * (mask / mask.mean(dim=(1, 2, 3), keepdim=True))
    error = squared.mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return error
    return error * prediction.snr.clamp(max=snr_gamma) / prediction.gain


def draw_noise(latents: Tensor, offset: float, generator: Generator) -> Tensor:
    """Unit noise, plus offset times a normal value for each channel; like the latents, but drawn on the CPU."""
    noise = torch.randn(latents.shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return noise.to(latents)


def draw_times(law: str, latents: Tensor, generator: Generator) -> Tensor:
    """A noise level for each example, by a distribution of TIMES; float32 [N] on the latents' device."""
    times = TIMES[law](len(latents), generator).to(latents)
    return shifted(times, latents.shape[-2] * latents.shape[-1] // 4) if law == "shift" else times


def shifted(times: Tensor, tokens: int) -> Tensor:
    """FLUX.1's shift towards noise, more of it for larger images: s t / (1 + (s - 1) t), s = e^mu, mu going from 0.5 at
    256 tokens to 1.15 at 4096, a token being 2 x 2 cells."""
    shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    return shift * times / (1 + (shift - 1) * times)


def trainable_attention() -> AbstractContextManager[None]:
    """In the block attention is not cuDNN's, which torch prefers on an H100 or H200: its backward pass reads beyond its
    memory at FLUX.1's 4,608 tokens (torch 2.11, seen on an H200), and gives NaN at other lengths with a mask
    (pytorch/pytorch issue 196678). What runs forward alone need not avoid it."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
