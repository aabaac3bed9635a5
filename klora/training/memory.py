"""In which precision the base is held while a LoRA is trained, and whether activations are recomputed: the fastest way
that is allowed and fits into memory."""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch

from klora.device import default_dtype, free_bytes
from klora.errors import RequestError
from klora.models.family import Family, Quantized
from klora.training.config import TrainConfig
from klora.training.cost import step_memory
from klora.training.draw import Material

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 3 << 30  # kernels' scratch, the allocator's fragments, the VAE that makes the samples
MIN_COMPILED_STEPS = 300  # fewer do not win back the minute that compiling takes
BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.1, "nf4": 0.6}  # with the quantisers' own scales
TRAINED_BYTES = 4 * 4  # fp32: a value, its gradient, two moments


class Mode(NamedTuple):
    """How the denoiser is held and run. dtype: that of its computation; quantized: how its weights are stored, None: in
    that dtype; checkpointing: whether the backward pass recomputes activations."""

    dtype: torch.dtype
    quantized: Quantized | None
    checkpointing: bool
    compiled: bool


def mode_for(
    bare: Family,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    material: Material,
    config: TrainConfig,
    device: torch.device,
) -> Mode:
    """The mode by what a step at the largest size needs. bare: the base without weights.

    shapes: {layer to train: (outputs, inputs)}.   Raises RequestError as choose() does.
    """
    largest = max((e.views[0].posterior.mean.shape for e in material.examples), key=math.prod)
    passes = 1 if config.prior_preservation == "none" else 2  # whose activations are alive at once

    def peak_bytes(dtype: torch.dtype, checkpointing: bool) -> int:
        prompt, latents = material.texts[""], (config.batch_size, *largest)
        memory = step_memory(bare, shapes, rank, latents, prompt, dtype=dtype, checkpointing=checkpointing)
        return memory.peak_bytes * passes

    weights = sum(parameter.numel() for parameter in bare.denoiser.parameters())
    trained = sum(rank * (outputs + inputs) for outputs, inputs in shapes.values())
    return choose(config, device, weights, trained, peak_bytes, free_bytes(device))


def choose(
    config: TrainConfig,
    device: torch.device,
    weights: int,
    trained: int,
    peak_bytes: Callable[[torch.dtype, bool], int],
    free_bytes: int,
) -> Mode:
    """The fastest mode that the config allows and that needs at most 0.9 of the free bytes; if none does, the leanest.

    weights, trained: numbers of parameters of the denoiser and of the LoRA.   peak_bytes(dtype, checkpointing): of a
    step's activations (training.cost).   Raises RequestError as check_precision() does.
    """
    compiled = config.compile == "on" or (
        config.compile == "auto" and device.type == "cuda" and config.steps >= MIN_COMPILED_STEPS
    )
    modes, limit = list(_allowed(config, device)), 0.9 * free_bytes
    activations = cache(peak_bytes)  # takes seconds, and is the same however the weights are stored
    for precision, recompute in modes:
        dtype, quantized = dtype_and_quantization(precision, device)
        needed = weights * BYTES_PER_WEIGHT[precision] + trained * TRAINED_BYTES + WORKSPACE_BYTES
        if len(modes) > 1 and (needed <= limit or (precision, recompute) == modes[-1]):
            needed += activations(dtype, recompute)
        if needed <= limit:
            break
    logger.info(
        "base in %s, activations %s%s, %.1f GB free, blocks %s",
        precision, "recomputed" if recompute else "kept",
        "" if len(modes) == 1 else f", {needed / 1e9:.1f} GB needed", free_bytes / 1e9,
        "compiled" if compiled else "not compiled",
    )  # fmt: skip
    return Mode(dtype, quantized, recompute, compiled)


def dtype_and_quantization(precision: str, device: torch.device) -> tuple[torch.dtype, Quantized | None]:
    """(dtype of computation, quantization of the weights or None) by a precision; "auto": the device's dtype, None."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, default_dtype(device))
    return dtype, precision if precision in ("int8", "nf4") else None  # type: ignore[return-value]


def check_precision(config: TrainConfig, device: torch.device) -> bool:
    """Whether the base can be quantised on the device. Raises RequestError if it cannot and the config asks for it."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if config.precision in ("int8", "nf4") and not (installed and device.type == "cuda"):
        lack = "this machine has no CUDA GPU" if installed else "bitsandbytes is not installed"
        raise RequestError(f"precision is {config.precision} and {lack}. Expected bf16 or fp32.")
    return installed and device.type == "cuda"


def _allowed(config: TrainConfig, device: torch.device) -> Iterator[tuple[str, bool]]:
    """(precision, whether activations are recomputed), fastest first."""
    quantizes = check_precision(config, device)
    plain = {torch.bfloat16: "bf16", torch.float32: "fp32"}[default_dtype(device)]
    precisions = [config.precision]
    if config.precision == "auto":
        precisions = [plain, "int8", "nf4"] if quantizes else [plain]
    for precision in precisions:
        for recompute in (False, True):
            if config.gradient_checkpointing in ("auto", "on" if recompute else "off"):
                yield precision, recompute
