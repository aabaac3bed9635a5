"""What a training step costs in arithmetic and in memory, found before any weight is loaded: on the meta device.

Knows no table of models: it runs the step that will be trained, on tensors without data.
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

from klora.lora import LowRank
from klora.models.family import Conditioning, Family
from klora.training.objective import Batch, Objective
from klora.training.trainable import trainable


class Memory(NamedTuple):
    """Of one forward and backward pass. saved_bytes: activations kept for the backward pass.   peak_bytes: the most
    that is alive at a time, weights not counted."""

    saved_bytes: int
    peak_bytes: int


def step_flops(model: Family, *step: Any, **options: Any) -> int:
    """What a step computes, 2 for each multiplication and addition; its arguments are step_memory's."""
    with _bare_step(model, *step, **options) as bare_step, _Flops() as flops:
        bare_step().backward()
    return flops.total


def step_memory(model: Family, *step: Any, **options: Any) -> Memory:
    """What a step keeps in memory. step and options: as _bare_step's.

    Attention counts as a fused kernel computes it: without a matrix of scores in memory.
    """
    with _bare_step(model, *step, **options) as bare_step, _FusedAttention(), _LiveBytes(model.denoiser) as live:
        loss = bare_step()
        saved = live.now
        # As loss.backward(), which is a call that _FusedAttention would handle and for so long not be in.
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
    """What computes a step's loss, on tensors without data. model: without the denoiser's weights (load_model's parts);
    its dtype, and whether it checkpoints and asks for gradients, are not as they were afterwards.

    shapes: {layer to adapt: (outputs, inputs)}; latents: shape [N, C, H, W]; conditioning: one prompt's, in any dtype.
    """
    denoiser: Any = nn.Module.to(model.denoiser, dtype)  # diffusers' own warns of what has no weights
    (denoiser.enable_gradient_checkpointing if checkpointing else denoiser.disable_gradient_checkpointing)()
    with torch.device("meta"):
        layers = {n: LowRank(_meta(rank, i), _meta(o, rank)) for n, (o, i) in shapes.items()}
        prompts = {name: part[:1].to("meta").expand(latents[0], *part.shape[1:]) for name, part in conditioning.items()}
        batch = Batch(torch.empty(latents), torch.empty(latents), torch.empty(latents[0]), prompts)
    with trainable(denoiser.requires_grad_(False), layers) as gate, _Remembered():
        yield lambda: Objective(model, gate)(batch)


def _meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


class _Flops(TorchDispatchMode):
    """Counts by torch's table, as its FlopCounterMode does, which first takes every other operation apart: most of the
    time that it takes, and below autograd there is nothing to be found."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being, until they are gone; not those of the weights."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: Any = WeakIdKeyDictionary({weight.untyped_storage(): 0 for weight in denoiser.parameters()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            self._count(storage)
        return made

    def _count(self, storage: Any) -> None:
        if storage in self._alive:
            return
        size = storage.nbytes()
        self._alive[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class _Remembered(TorchDispatchMode):
    """Answers what has been computed before of tensors of these shapes, as most of a step has been in an earlier block,
    with fresh tensors of what came of it then: torch's own shape functions are in Python, and slow."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[Any, Any] = {}
        self._not_fresh: set[Any] = set()  # operations that give back what they are given, or a view of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._not_fresh:
            return func(*args, **(kwargs or {}))
        asked = (func, _facts(args), _facts(tuple((kwargs or {}).items())))
        if asked in self._made:
            return tree_map_only(partial, lambda fresh: fresh(), self._made[asked])
        made = func(*args, **(kwargs or {}))
        given, results = ({storage._cdata for storage in _storages(value)} for value in ((args, kwargs), made))
        if given.isdisjoint(results):
            self._made[asked] = tree_map_only(Tensor, _like, made)
        else:
            self._not_fresh.add(func)
        return made


def _storages(value: Any) -> list[Any]:
    """Of all tensors in what an operation takes or gives."""
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _like(tensor: Tensor) -> Callable[[], Tensor]:
    """What makes tensors of this one's shape and dtype."""
    return partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _facts(value: Any) -> Any:
    """What an operation's result depends on, on the meta device."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_facts, value)) if isinstance(value, (list, tuple)) else (type(value), value)


class _FusedAttention(TorchFunctionMode):
    """Takes the place of attention, which on the meta device would make its matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            bound = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            fused: Any = _Fused
            return fused.apply(bound["query"], bound["key"], bound["value"])
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
