"""Which linear layers a model has, and in which order a denoiser runs them."""

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of a module's linear layers, as registered."""
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def execution_order(denoiser: Any, inputs: Callable[[Any], Mapping[str, Any]]) -> Mapping[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of a denoiser's linear layers in the order of their first call.

    inputs: keyword arguments of any call of such a denoiser. It takes seconds, once for all of one architecture.
    """
    # Without what says where it came from, and how its weights are quantised.
    config = {name: value for name, value in denoiser.config.items() if not re.match("_|quantization_config$", name)}
    kind = getattr(denoiser, "_orig_mod", denoiser).__class__  # of what torch.compile() made, what it was made of
    return _execution_order(kind, json.dumps(config, sort_keys=True), inputs)


@lru_cache
def _execution_order(kind: Any, config: str, inputs: Callable[[Any], Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Found by running a twin without weights on the meta device. config: JSON."""
    with torch.device("meta"):
        twin = kind.from_config(json.loads(config))
    shapes = linear_shapes(twin)
    called: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        twin.get_submodule(name).register_forward_pre_hook(lambda *_, n=name, s=shape: called.setdefault(n, s) and None)
    with torch.no_grad():
        twin(**tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs(twin)))
    return called | shapes
