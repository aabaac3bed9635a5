"""FLUX.1's attention with a rotation that it is given: diffusers' bits, lent and given back."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from torch import nn

from klora import Request, generate, load_model
from klora.models import pace
from klora.models.attention import FluxAttention
from klora.models.family import Compiled, Family
from klora.models.pace import paced


@pytest.fixture
def flux(bases: Path) -> Family:
    return load_model("flux", bases / "flux-dev", torch.device("cpu"))


def drawn(flux: Family, images: int) -> np.ndarray:
    request = Request("a dog", seed=3, num_inference_steps=6, width=64, height=64, num_outputs=images)
    return np.stack([np.asarray(image) for image in generate(flux, request)])


def by_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the kernel."""
    monkeypatch.setattr(pace, "has_triton", lambda device: True)
    monkeypatch.setitem(sys.modules, "klora.kernels", SimpleNamespace(rotated=by_torch))


def processors(flux: Family) -> list[Any]:
    return [
        module.processor for module in flux.denoiser.modules() if isinstance(module, transformer_flux.FluxAttention)
    ]


@pytest.mark.parametrize("images", [1, 3])
def test_flux_draws_the_same_bits_with_another_rotation(
    flux: Family, with_kernels: None, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    for norm in (module for module in flux.denoiser.modules() if isinstance(module, nn.RMSNorm)):
        nn.init.normal_(norm.weight)  # all alike as they are made
    before, seen = processors(flux), list[Any]()
    monkeypatch.setattr(flux, "sample", lambda *args, draw=flux.sample: (seen.extend(processors(flux)), draw(*args))[1])
    ours = drawn(flux, images)
    assert len(seen) == len(before) > 2 and all(isinstance(processor, FluxAttention) for processor in seen)
    assert all(one is other for one, other in zip(processors(flux), before, strict=True))
    monkeypatch.setattr(pace, "has_triton", lambda device: False)
    assert np.array_equal(drawn(flux, images), ours)
    assert seen[len(before) :] == before


def test_attention_that_somebody_has_changed_stays_as_it_is(flux: Family, with_kernels: None) -> None:
    first, second, third, *_ = (module for module in flux.denoiser.modules() if hasattr(module, "fused_projections"))
    first.processor._attention_backend = "native"
    second.processor = type("Own", (transformer_flux.FluxAttnProcessor,), {})()
    third.fused_projections = True
    changed = [module.processor for module in (first, second, third)]
    with paced(flux, Request("a dog", seed=0)):
        assert [module.processor for module in (first, second, third)] == changed
        assert isinstance(processors(flux)[-1], FluxAttention)


def test_compiled_blocks_keep_the_attention_that_they_were_compiled_with(flux: Family, with_kernels: None) -> None:
    flux.compiled, before = Compiled(("x_embedder",)), processors(flux)
    for go_fast in (True, False):
        with paced(flux, Request("a dog", seed=0, go_fast=go_fast)):
            assert (processors(flux) == before) == go_fast
