"""CUDA graphs in the place of many small launches, for denoisers that would wait for their host. Knows no LoRA."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from klora.layers import clear, lending


@contextmanager
def recorded(denoiser: Any) -> Iterator[None]:
    """With a Recording in the place of its forward, and its device as torch's current one, on which graphs are."""
    with torch.cuda.device_of(next(denoiser.parameters())), lending() as loans:
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
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                output = self._forward(*args, **kwargs)
        finally:  # torch gives the stream back, but not where a cancellation comes while it begins or ends to record
            try:
                if torch.cuda.is_current_stream_capturing():
                    graph.capture_end()
            finally:
                torch.cuda.set_stream(stream)
        return graph, held, output
