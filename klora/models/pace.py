"""How a denoiser is run: recorded where its host would be slower, and for go_fast with blocks that have been compiled,
and with those after the first left out in steps where the first says that they would add what they added before. Knows
no LoRA, but what engine has lent some.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from klora.device import free_bytes, has_triton
from klora.form.request import Request
from klora.layers import Engine, clear, headroom_bytes, lend, lending
from klora.models.attention import FluxAttention
from klora.models.family import Compiled, Family
from klora.models.recording import recorded

THRESHOLD = 0.1  # relative change of what the first block adds, below which the others' addition is taken over

InFull = Callable[[bool], None]
"""Told before each step whether all blocks have to run in it, whatever the first one says."""


@contextmanager
def paced(model: Family, request: Request, engine: Engine | None = None) -> Iterator[tuple[InFull, list[str]]]:
    """Run a denoiser as request.go_fast asks, for the length of the block. Yields what is to be told before each step,
    and what makes it fast: nothing where it is not asked for or this base has nothing to offer. engine: of the LoRAs
    that it has been lent.

    A request that does not ask runs the blocks as they are, compiled or not. Either way a CUDA graph is recorded where
    the host would be what a denoiser waits for, and there is memory for it: the same kernels, and so the same image.
    """
    # The merged engine leaves modules as they are, or has its own compiled with the blocks.
    compiled = request.go_fast and model.compiled and (engine != "gated" or model.compiled.alike)
    with ExitStack() as stack:
        if model.compiled:
            # What turns out to lack compiled code runs without: no request waits for it.
            stance = "eager_on_recompile" if compiled else "force_eager"
            stack.enter_context(torch.compiler.set_stance(stance))
        in_full: InFull = lambda wanted: None  # noqa: E731  where every step is in full anyway
        means = ["compiled blocks"] if compiled else []
        # Only diffusers' text-to-image pipelines say whose pass it is, which the cache has to know.
        if request.go_fast and isinstance(model.denoiser, CacheMixin) and request.image is None:
            in_full = stack.enter_context(_first_block_cache(model.denoiser))
            means.append("first-block cache")
        device = next(model.denoiser.parameters()).device
        if has_triton(device) and not compiled:
            stack.enter_context(_in_fewer_kernels(model.denoiser))
        # Twice: what a graph has recorded keeps its memory while the VAE decodes.
        headroom = headroom_bytes(request.pixels(model.native_size, model.size_multiple))
        if model.host_bound and device.type == "cuda" and free_bytes(device) >= 2 * headroom:
            stack.enter_context(recorded(model.denoiser))
        yield in_full, means


def compiled_for(model: Family, request: Request) -> Compiled:
    """By what a request's LoRAs are lent, so that compiled blocks serve it: by nothing, unless it asks to go fast."""
    return model.compiled if request.go_fast and model.compiled else Compiled()


@contextmanager
def _in_fewer_kernels(denoiser: nn.Module) -> Iterator[None]:
    """With our FluxAttention in the place of diffusers' own, where that is as it was made."""
    from klora.kernels import rotated  # triton is not everywhere

    with lending() as loans:
        for module in denoiser.modules():
            processor = module.__dict__.get("processor")
            if type(processor) is FluxAttnProcessor and not vars(processor) and not module.fused_projections:
                lend(loans, module.__dict__, "processor", FluxAttention(rotated))
        yield


@contextmanager
def _first_block_cache(denoiser: Any) -> Iterator[InFull]:
    """diffusers' own (after ParaAttention), lent: its hooks go again by whatever exception."""
    blocks = [block for part in denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
    with lending() as loans:
        for module in (denoiser, *blocks):
            for key in ("forward", "_diffusers_hook", "_cache_config"):
                clear(loans, module.__dict__, key)
        denoiser.enable_cache(FirstBlockCacheConfig(THRESHOLD))
        hook = HookRegistry.check_if_exists_or_initialize(blocks[0]).get_hook(_FBC_LEADER_BLOCK_HOOK)

        def in_full(wanted: bool) -> None:
            hook.threshold = -1.0 if wanted else THRESHOLD  # no change is less than none

        yield in_full
