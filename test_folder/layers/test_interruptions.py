"""An exception from outside, wherever Python may deliver it, leaves no trace."""

import copy
import ctypes
import dis
import random
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from klora import layers
from klora.layers import attached, engines, float8, loans, pairs
from klora.models import family
from klora.models.following import following
from test_folder.layers import network as small
from test_folder.layers.network import ENGINES, photograph, switching_plan

LENDING = [layers, engines, float8, loans, pairs]
ON_3_11 = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="where Python delivers exceptions depends on its version"
)


class Interruption(BaseException):
    """What a server throws into a thread to cancel it."""


class Interrupter:
    """A tracer that raises at the n-th place where CPython 3.11 would deliver an exception from outside: as a function
    begins or a generator goes on, after a call, and at a jump backwards."""

    def __init__(self, files, n):
        self.files, self.left, self.place = files, n, None
        self.previous = {}

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if self.may_interrupt(frame, event):
            self.left -= 1
            if self.left == 0:
                self.place = f"{frame.f_code.co_name}, line {frame.f_lineno}, {event}"
                raise Interruption
        return self

    def may_interrupt(self, frame, event):
        if event == "opcode":
            operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            previous, self.previous[id(frame)] = self.previous.get(id(frame)), operation
            return "JUMP_BACKWARD" in operation or previous in ("CALL", "CALL_FUNCTION_EX")
        self.previous.pop(id(frame), None)
        return event == "call"


def visit_all_steps(model, plan, engine, **options):
    with attached(model, plan, engine=engine, **options) as gate:
        for step in range(len(plan.gates)):
            gate.set_step(step)


def follow_one_step(denoiser):
    scheduler = SimpleNamespace(timesteps=[1], num_inference_steps=1)
    pipe = SimpleNamespace(unet=denoiser, scheduler=scheduler, num_timesteps=1)
    with following(pipe, lambda step: None) as on_step_end:
        denoiser(torch.zeros(1, 6))
        on_step_end(pipe, 0, 1, {})


def in_float8(model, plan):
    visit_all_steps(model, plan, "merged", float8=plan.layers[1:])


def interrupted_at(n, modules, work, *inputs):
    """Where the n-th interruption landed in these modules' part of the work; None when the work was over before."""
    ours = {__file__, small.__file__, sys.modules["contextlib"].__file__}
    files = ours.union(module.__file__ for module in modules)
    interrupter = Interrupter(files, n)
    tracer = sys.gettrace()
    try:
        sys.settrace(interrupter)
        work(*inputs)
    except Interruption:
        pass
    else:
        assert interrupter.place is None, f"what interrupted {interrupter.place} is lost, and the work goes on"
    finally:
        sys.settrace(tracer)
    return interrupter.place


def places_that_leave_a_trace(network, modules, work, *inputs):
    """Of all places where an interruption may land, those after which the network is not as before."""
    landed, spoilt = [], []
    while len(landed) < 2000:
        model = copy.deepcopy(network)
        before = photograph(model)
        place = interrupted_at(len(landed) + 1, modules, work, model, *inputs)
        if photograph(model) != before:
            spoilt.append(place)
        if place is None:
            return landed, spoilt
        landed.append(place)
    raise AssertionError("The work never ends.")


@ON_3_11
@pytest.mark.parametrize("engine", ENGINES)
def test_interruption_wherever_python_may_deliver_one_leaves_no_trace(network, engine):
    plan = switching_plan(network, steps=3)
    landed, spoilt = places_that_leave_a_trace(network, LENDING, visit_all_steps, plan, engine)
    assert len(landed) > 100
    assert spoilt == []


@ON_3_11
def test_interruption_of_products_in_float8_leaves_no_trace(network):
    landed, spoilt = places_that_leave_a_trace(network, LENDING, in_float8, switching_plan(network, steps=2))
    assert len(landed) > 100
    assert spoilt == []


@ON_3_11
def test_interruption_of_the_follower_of_a_pipeline_leaves_no_hook(network):
    landed, spoilt = places_that_leave_a_trace(network, [family], follow_one_step)
    assert len(landed) > 10
    assert spoilt == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_exception_thrown_in_by_another_thread_at_a_random_moment_leaves_no_trace(network, engine):
    before, plan, moments = photograph(network), switching_plan(network), random.Random(0)
    interrupted = 0

    def work():
        nonlocal interrupted
        try:
            for _ in range(100):  # not for ever: Python swallows an exception that lands in a destructor
                visit_all_steps(network, plan, engine)
        except Interruption:
            interrupted += 1

    for _ in range(100):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(moments.random() * 0.005)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interruption))
        thread.join()
        assert photograph(network) == before
    assert interrupted > 50
