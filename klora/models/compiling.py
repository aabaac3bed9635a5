"""What set-up does so that no request waits for a compiler: repeated blocks compiled, and kernels that are used first.

Lends LoRAs that change nothing, of each kind that requests may bring.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from klora.form.request import Request
from klora.layers import Engine, attached, takes_float8
from klora.lora import LowRank, Plan
from klora.models.family import Compiled, Conditioning, Family
from klora.models.pace import compiled_for, paced


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
    plan, used_engines = Plan.constant((_idle(denoiser, alike),), (1.0,)), set[Engine]()
    # As many as there are kinds of inputs and of blocks, which torch's own limit hardly allows.
    limits = torch._dynamo.config.patch(recompile_limit=64)
    with torch.no_grad(), limits:
        conditioning = conditioning or model.encode_prompt(["a picture"])
        _drawn_by_one_and_by_two(model, conditioning)
        for engine in engines:
            with attached(denoiser, plan, engine=engine, alike=alike, float8=rounded) as gate:
                used_engines.add(gate.engine)
                _drawn_by_one_and_by_two(model, conditioning)
    model.compiled = Compiled(alike if "gated" in used_engines else (), rounded if "merged" in used_engines else ())


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
            float8_layers = compiled_for(model, request).float8
            with paced(model, request), attached(model.denoiser, plan, float8=float8_layers) as gate:
                model.sample(conditioning, request, gate.set_step)


def _compiled_linears(denoiser: nn.Module) -> list[str]:
    """Names of the linears in blocks that have been compiled."""
    blocks = [(name, part) for name, part in denoiser.named_modules() if part._compiled_call_impl is not None]
    return [f"{name}.{at}" for name, block in blocks for at, part in block.named_modules() if type(part) is nn.Linear]


def _for_float8(denoiser: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those that see tokens. By the others norms are modulated, and an error of theirs would be all tokens'."""
    return tuple(n for n in names if not re.search(r"\.norm\w*\.", n) and takes_float8(denoiser.get_submodule(n)))


def _idle(denoiser: nn.Module, names: Iterable[str]) -> Mapping[str, LowRank]:
    """A LoRA of these layers that changes nothing, of a rank that no activation has in its shape: torch would take the
    two for one."""
    linears: dict[str, Any] = {name: denoiser.get_submodule(name) for name in names}  # Any: get_submodule's type
    return {
        name: LowRank(torch.zeros(1, linear.in_features).expand(48, -1), torch.zeros(1).expand(linear.out_features, 48))
        for name, linear in linears.items()
    }
