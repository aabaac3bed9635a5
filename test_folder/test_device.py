"""Where our own kernels are used: not on a GPU that is too old for them, nor where Triton does not work. What
is let go is collected, and an interruption meanwhile is heard."""

import ctypes
import sys
import threading
import weakref
from collections.abc import Iterator
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any

import pytest
import torch

from klora import device as subject
from klora.device import has_float8, has_triton, release

CUDA = torch.device("cuda")


class Driver:
    """Of triton's, whose first use compiles it."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.uses = error, 0

    @property
    def active(self) -> Any:
        self.uses += 1
        if self.error:
            raise self.error
        return self


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """With a Hopper and a Triton that works."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    install(monkeypatch, Driver(None))
    subject._triton_works.cache_clear()
    yield monkeypatch
    subject._triton_works.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    runtime = ModuleType("triton.runtime")
    runtime.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setattr(subject, "find_spec", lambda name: name == "triton")
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)


def test_kernels_are_used_on_a_gpu_that_is_new_enough(machine: pytest.MonkeyPatch) -> None:
    assert has_triton(CUDA)
    assert not has_triton(torch.device("cpu")) and not has_triton(torch.device("mps"))
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert has_triton(CUDA)
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has_triton(CUDA)


def test_float8_is_multiplied_on_an_nvidia_gpu_that_is_new_enough(machine: pytest.MonkeyPatch) -> None:
    assert has_float8(CUDA) and not has_float8(torch.device("cpu"))
    for capability, expected in (((8, 9), True), ((8, 6), False), ((8, 0), False), ((10, 0), True)):
        machine.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_float8(CUDA) is expected
    machine.setattr(torch.version, "cuda", None)
    assert not has_float8(CUDA)


def test_kernels_are_not_used_on_another_makers_gpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.version, "cuda", None)
    assert not has_triton(CUDA)


def test_kernels_are_not_used_where_there_is_no_triton(
    machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.setattr(subject, "find_spec", lambda name: None)
    assert not has_triton(CUDA) and not caplog.records


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler."),  # as triton says it
        CalledProcessError(1, ["gcc", "cuda_utils.c"]),  # without Python.h
        ImportError("cuda_utils.so: cannot open shared object file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_triton_that_cannot_compile_is_told_of_once(
    machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    driver = Driver(error)
    install(machine, driver)
    assert not has_triton(CUDA) and not has_triton(CUDA)
    assert driver.uses == 1
    assert caplog.messages == [f"Triton cannot be used, so that torch's slower kernels are: {error}"]


class Node:
    """In a circle with itself, which the collector alone finds."""

    def __init__(self) -> None:
        self.itself = self


class Interruption(BaseException):
    """As Cog raises it for a cancelled prediction."""


def test_an_interruption_while_the_collector_calls_a_finalizer_is_heard() -> None:
    main = ctypes.c_ulong(threading.get_ident())
    weakref.finalize(Node(), ctypes.pythonapi.PyThreadState_SetAsyncExc, main, ctypes.py_object(Interruption))
    with pytest.raises(Interruption):
        release(torch.device("cpu"))
