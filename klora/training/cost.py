"""What a training step costs in arithmetic and in memory, found before any weight is loaded.

No table of models: the step that will be trained runs on the meta device, on tensors without data.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from klora.interruptible import interruptible
from klora.lora import LowRank
from klora.models.family import Conditioning, Family
from klora.training.objective import Batch, Objective
from klora.training.trainable import trainable


class Memory(NamedTuple):
    """The memory of one forward and backward pass, without the weights. saved_bytes: activations kept for the backward
    pass.   peak_bytes: the most that is alive at a time."""

    saved_bytes: int
    peak_bytes: int


def step_flops(model: Family, *step: Any, **options: Any) -> int:
    """Floating-point operations of a step, 2 for each multiply-add. step and options: as _bare_step's."""
    with _bare_step(model, *step, **options) as bare_step, _Flops() as flops:
        bare_step().backward()
    return flops.total


def step_memory(model: Family, *step: Any, **options: Any) -> Memory:
    """The memory of a step. step and options: as _bare_step's.

    Attention counts as a fused kernel computes it: without a matrix of scores in memory.
    """
    # In another thread: every tensor has a finalizer, in which Python would ignore an interruption of this one.
    return interruptible(partial(_step_memory, model, *step, **options))


def _step_memory(model: Family, *step: Any, **options: Any) -> Memory:
    with _bare_step(model, *step, **options) as bare_step, _FusedAttention(), _LiveBytes(model.denoiser) as live:
        loss = bare_step()
        saved = live.now
        # As loss.backward(), which would itself be handled by _FusedAttention, and run with that switched off.
        engine: Any = Variable._execution_engine
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)
    return Memory(saved, live.peak)


@contextmanager
def _bare_step(
    model: Family,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    latents: tuple[int, ...],
    conditioning: Conditioning,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
) -> Iterator[Callable[[], Tensor]]:
    """Yields a function that computes a step's loss, on tensors without data. model: loaded without the denoiser's
    weights; keeps the dtype, the checkpointing and the requires_grad that it is given here.

    shapes: {layer to adapt: (outputs, inputs)}; latents: shape [N, C, H, W]; conditioning: one prompt's, in any dtype.
    """
    denoiser: Any = nn.Module.to(model.denoiser, dtype)  # diffusers' own warns of what has no weights
    (denoiser.enable_gradient_checkpointing if checkpointing else denoiser.disable_gradient_checkpointing)()
    with torch.device("meta"):
        layers = {n: LowRank(_meta(rank, i), _meta(o, rank)) for n, (o, i) in shapes.items()}
        prompts = {name: part[:1].to("meta").expand(latents[0], *part.shape[1:]) for name, part in conditioning.items()}
        batch = Batch(torch.empty(latents), torch.empty(latents), torch.empty(latents[0]), prompts)
    with trainable(denoiser.requires_grad_(False), layers) as gate, _ShapeCache():
        yield lambda: Objective(model, gate)(batch)


def _meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


class _Flops(TorchDispatchMode):
    """Counts by torch's table, as torch's FlopCounterMode does; but that first decomposes every other operation, which
    takes most of its time, and finds nothing below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at a time, now and at most, without the weights'."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary({weight.untyped_storage(): 0 for weight in denoiser.parameters()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class _ShapeCache(TorchDispatchMode):
    """Runs an operation once for inputs of the same shapes, and then makes new tensors like its results: most of a step
    repeats an earlier block, and torch's shape functions are in Python, and slow."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results: dict[Any, Any] = {}
        self._aliasing: set[Any] = set()  # operations that return an input, or a view of one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._aliasing:
            return func(*args, **(kwargs or {}))
        call = (func, _signature(args), _signature(tuple((kwargs or {}).items())))
        if call in self._results:
            return tree_map_only(partial, lambda make: make(), self._results[call])
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ({storage._cdata for storage in _storages(value)} for value in ((args, kwargs), result))
        if inputs.isdisjoint(outputs):
            self._results[call] = tree_map_only(Tensor, _like, result)
        else:
            self._aliasing.add(func)
        return result


def _storages(value: Any) -> list[Any]:
    """The storages of all tensors in an operation's arguments or result."""
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _like(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that makes empty tensors of this one's shape, strides and dtype."""
    return partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _signature(value: Any) -> Any:
    """All of an argument that an operation's result depends on, on the meta device; hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else (type(value), value)


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by _Fused, because on the meta device torch's own makes its matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            bound = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            fused: Any = _Fused
            return fused.apply(bound["query"], bound["key"], bound["value"])
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Attention that saves for the backward pass what a fused kernel does: inputs and output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
