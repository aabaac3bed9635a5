"""How a denoiser is run: with a CUDA graph in the place of many small launches, and for go_fast with repeated blocks
compiled, and with the blocks after the first left out in steps where the first says that they would add what they added
before. Knows no LoRA.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from klora.device import free_bytes, has_triton
from klora.form.request import Request
from klora.layers import HEADROOM_BYTES, Engine, attached, clear, lend, lending, takes_float8
from klora.lora import LowRank, Plan
from klora.models.attention import FluxAttention
from klora.models.family import Compiled, Conditioning, Family

THRESHOLD = 0.1  # relative change of what the first block adds, below which the others' addition is taken over

InFull = Callable[[bool], None]
"""Told before each step whether all blocks have to run in it, whatever the first one says."""


def compile_blocks(
    model: Family,
    backend: str | Callable[..., Any] = "inductor",
    conditioning: Conditioning | None = None,
    engines: Sequence[Engine | None] = (None,),
    *,
    float8: bool = False,
) -> None:
    """Compile a base's repeated blocks, of which each kind is compiled once (torch's "regional compilation"), and run
    them until that is done for every size and number of images, without LoRAs and with those of the engines, so that no
    request waits for it. backend: of torch.compile; conditioning: of some prompt, where the base has no text encoders
    to encode one; engines: None is the one that there is memory for; float8: whether go_fast multiplies in it."""
    denoiser: Any = model.denoiser
    denoiser.compile_repeated_blocks(dynamic=True, backend=backend)
    alike = tuple(_compiled_linears(denoiser))
    rounded = _for_float8(denoiser, alike) if float8 else ()
    plan, lent = Plan.constant((_idle(denoiser, alike),), (1.0,)), set[Engine]()
    # As many as there are kinds of inputs and of blocks, which torch's own limit hardly allows.
    limits = torch._dynamo.config.patch(recompile_limit=64)
    with torch.no_grad(), torch.compiler.set_stance("default"), limits:
        conditioning = conditioning or model.encode_prompt(["a picture"])
        _drawn_by_one_and_by_two(model, conditioning)
        for engine in engines:
            with attached(denoiser, plan, engine=engine, alike=alike, float8=rounded) as gate:
                lent.add(gate.engine)
                _drawn_by_one_and_by_two(model, conditioning)
    model.compiled = Compiled(alike if "gated" in lent else (), rounded if "merged" in lent else ())


def _drawn_by_one_and_by_two(model: Family, conditioning: Conditioning) -> None:
    """torch compiles a batch of one apart from others."""
    for images in (1, 2):
        request = Request("a picture", num_outputs=images, num_inference_steps=2, megapixels="0.25", seed=0)
        model.sample(conditioning, request, lambda step: None)


def warm_up(model: Family) -> None:
    """Draw something small, with two LoRAs that change nothing, then one, then none: no request waits for what a GPU's
    libraries load, and Triton compiles, at its first use."""
    linears = [name for name, part in model.denoiser.named_modules() if type(part) is nn.Linear]
    float8 = model.compiled.float8 if model.compiled else ()
    name = [*float8, *linears][0]
    lora = _idle(model.denoiser, [name])
    plan = Plan((name,), (lora, lora), torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.0]]]))
    with torch.no_grad():
        conditioning = model.encode_prompt(["a picture"])
        for go_fast in (False, True) if float8 else (False,):
            request = Request("a picture", num_inference_steps=3, megapixels="0.25", seed=0, go_fast=go_fast)
            lent = attached(model.denoiser, plan, float8=compiled_for(model, request).float8)
            with paced(model, request), lent as gate:
                model.sample(conditioning, request, gate.set_step)


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
        in_full: InFull = _ignore
        means = ["compiled blocks"] if compiled else []
        # Only diffusers' text-to-image pipelines say whose pass it is, which the cache has to know.
        if request.go_fast and isinstance(model.denoiser, CacheMixin) and request.image is None:
            in_full = stack.enter_context(_first_block_cache(model.denoiser))
            means.append("first-block cache")
        device = next(model.denoiser.parameters()).device
        if has_triton(device) and not compiled:
            stack.enter_context(_in_fewer_kernels(model.denoiser))
        # Twice: what a graph has recorded keeps its memory while the VAE decodes.
        if model.host_bound and device.type == "cuda" and free_bytes(device) >= 2 * HEADROOM_BYTES:
            stack.enter_context(_recorded(model.denoiser))
        yield in_full, means


def compiled_for(model: Family, request: Request) -> Compiled:
    """By what a request's LoRAs are lent, so that compiled blocks serve it: by nothing, unless it asks to go fast."""
    return model.compiled if request.go_fast and model.compiled else Compiled()


def _compiled_linears(denoiser: nn.Module) -> list[str]:
    """Names of the linears in blocks that have been compiled."""
    blocks = [(name, part) for name, part in denoiser.named_modules() if part._compiled_call_impl is not None]
    return [
        f"{name}.{place}" for name, block in blocks for place, part in block.named_modules() if type(part) is nn.Linear
    ]


def _for_float8(denoiser: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those that see tokens. By the others norms are modulated, and an error of theirs would be all tokens'."""
    seen = (name for name in names if not re.search(r"\.norm\w*\.", name))
    return tuple(name for name in seen if takes_float8(denoiser.get_submodule(name)))


def _idle(denoiser: nn.Module, names: Iterable[str]) -> Mapping[str, LowRank]:
    """A LoRA of these layers that changes nothing, of a rank that no activation has in its shape: torch would take the
    two for one."""
    linears: dict[str, Any] = {name: denoiser.get_submodule(name) for name in names}  # Any: get_submodule's type
    return {
        name: LowRank(torch.zeros(1, linear.in_features).expand(48, -1), torch.zeros(1).expand(linear.out_features, 48))
        for name, linear in linears.items()
    }


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


@contextmanager
def _recorded(denoiser: Any) -> Iterator[None]:
    """With a Recording in the place of its forward."""
    with lending() as loans:
        clear(loans, denoiser.__dict__, "forward")
        denoiser.forward = Recording(denoiser.forward)
        yield


class Recording:
    """A forward whose second call is recorded as a CUDA graph, and launched as a whole from then on; a graph for each
    kind of call, by its shapes, dtypes and what is no tensor. What it reads beside its arguments, as weights and gates,
    has to keep its address, and may change its values."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[Any], Any] | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        facts = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        kind = (str(spec), *facts)
        if kind not in self._graphs:  # libraries choose their kernels at a first call, which cannot be recorded
            self._graphs[kind] = None
            return self._forward(*args, **kwargs)
        graph, held, output = self._graphs[kind] = self._graphs[kind] or self._record(leaves, spec)
        for mine, leaf in zip(held, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(leaf, non_blocking=True)
        graph.replay()
        return tree_map_only(Tensor, torch.clone, output)  # schedulers keep what the next call would overwrite

    def _record(self, leaves: list[Any], spec: TreeSpec) -> tuple[torch.cuda.CUDAGraph, list[Any], Any]:
        held = [leaf.to("cuda", copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(held, spec)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._forward(*args, **kwargs)
        return graph, held, output


def _ignore(wanted: bool) -> None:
    """Where every step is in full anyway."""
