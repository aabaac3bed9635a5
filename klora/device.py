"""Which device to run on, in which dtype, and how much of its memory is free. Knows nothing of models."""

import gc
import logging
from functools import cache
from importlib.util import find_spec
from subprocess import SubprocessError

import psutil
import torch

from klora.interruptible import interruptible

logger = logging.getLogger(__name__)


def default_device() -> torch.device:
    """CUDA where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA; float32 elsewhere (bfloat16 on a CPU is tens of times slower)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def has_triton(device: torch.device) -> bool:
    """Whether klora.kernels can be used there: on an NVIDIA GPU since Ampere, where Triton works."""
    return _capability(device) >= (8, 0) and _triton_works()


def has_float8(device: torch.device) -> bool:
    """Whether tensor cores multiply in float8 there: on an NVIDIA GPU since Ada."""
    return _capability(device) >= (8, 9)


def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; of anything else none."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


@cache
def _triton_works() -> bool:
    """torch for CUDA has Triton on Linux, which compiles a part of itself when it is first used: for that it needs a C
    compiler and Python's headers."""
    if not find_spec("triton"):
        return False
    try:
        from triton.runtime import driver

        return driver.active is not None
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        logger.warning("Triton cannot be used, so that torch's slower kernels are: %s", error)
        return False


def free_bytes(device: torch.device) -> int:
    """Bytes that a new tensor on the device may take, counting what torch holds in reserve and would reuse."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return int(psutil.virtual_memory().available)


def release(device: torch.device) -> None:
    """Give back what has just been let go."""
    interruptible(gc.collect)  # Python ignores what is raised in finalizers, and so an interruption of this thread
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock read next means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def forget_peak(device: torch.device) -> None:
    """Let peak_bytes() begin here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors took at a time since forget_peak(), all that was there before included; None where it is
    not counted, which is anywhere but on CUDA."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
