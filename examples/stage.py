"""A stage of a training that takes minutes on a GPU and hours on a CPU: its steps counted, its log kept, a file left to
go on from, and what is learnt recorded once where launching kernels takes longer than running them."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

SAVE_SECONDS, REPORT_STEPS, WARM_STEPS = 120, 50, 200

Lesson = Callable[..., Mapping[str, Tensor]]
"""From inputs, by name, to the "loss" and to whatever else a log should say, numbers all."""


class Task(NamedTuple):
    """What a stage is told. rate: of learning, at its height; state: the folder of what is half done; toys: of what is
    done."""

    base: str
    steps: int
    batch: int
    rate: float
    device: torch.device
    state: Path
    toys: Path

    @property
    def folder(self) -> Path:
        """The base's, in diffusers' layout."""
        return self.toys / self.base


class Stage:
    """What every stage shares: steps counted, a log, and a file to go on from."""

    def __init__(
        self, task: Task, name: str, modules: Mapping[str, nn.Module], slower: Mapping[str, float] | None = None
    ) -> None:
        """slower: by what the task's rate is multiplied for some of the modules."""
        self.task, self.modules = task, modules
        self.name = f"{task.base}-{name}"
        rates = {name: task.rate * (slower or {}).get(name, 1.0) for name in modules}
        learning = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
        self.parameters = parameters = [p for own in learning.values() for p in own]
        groups = [{"params": own, "lr": rates[name]} for name, own in learning.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
        law = lambda step: min(1.0, (step + 1) / WARM_STEPS) * max(0.02, 1 - step / task.steps) ** 0.7  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, law)
        self.averages = [parameter.detach().clone() for parameter in parameters]
        self.recorded = Recorded(parameters)
        self.step, self._saved, self._began = 0, time.monotonic(), time.monotonic()
        if self._path.is_file():
            self._load()

    @property
    def _path(self) -> Path:
        return self.task.state / f"{self.name}.pt"

    def run(self) -> Iterator[Generator]:
        """Chance for each of the steps to take, on the task's device; saves in between."""
        while self.step < self.task.steps:
            yield torch.Generator(self.task.device).manual_seed(self.step)
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        self.save()

    def learn(self, lesson: Lesson, **inputs: Tensor) -> None:
        """Take a step by a lesson, always the same one, whose inputs keep their shapes."""
        facts = self.recorded.measure(lesson, inputs)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        decay = min(0.999, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        if self.step % REPORT_STEPS == 0 or self.step == self.task.steps:
            line = {"stage": self.name, "step": self.step, **{name: round(float(x), 5) for name, x in facts.items()}}
            line["seconds"] = round(time.monotonic() - self._began, 1)
            print(json.dumps(line), flush=True)
            with (self.task.state / f"{self.name}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Leave a file from which the next call goes on."""
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "averages": self.averages}
        state |= {"schedule": self.schedule.state_dict()}
        state |= {"modules": {name: module.state_dict() for name, module in self.modules.items()}}
        torch.save(state, self._path.with_suffix(".part"))
        self._path.with_suffix(".part").replace(self._path)
        self._saved = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self._path, map_location=self.parameters[0].device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.averages, self.step = state["averages"], state["step"]
        print(f"{self.name}: going on from step {self.step}")

    def finish(self) -> None:
        """Leave the running means, which draw best, in the modules, and a tenth of the log among the toys."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data.copy_(average)
        lines = (self.task.state / f"{self.name}.jsonl").read_text().splitlines()[9::10]
        (self.task.toys / f"{self.name}.jsonl").write_text("\n".join(lines) + "\n")


class Recorded:
    """A lesson and its gradients: on a GPU they are recorded as a CUDA graph, once, and replayed."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._graph: torch.cuda.CUDAGraph | None = None

    def measure(self, lesson: Lesson, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the lesson says, its gradients left with the parameters."""
        if self._parameters[0].device.type != "cuda":
            return self._measured(lesson, inputs)
        if self._graph is None:
            self._record(lesson, inputs)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self._facts

    def _record(self, lesson: Lesson, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries set themselves up in their first calls, which no graph can hold
            for _ in range(3):
                self._measured(lesson, self._inputs)
        torch.cuda.current_stream().wait_stream(beside)
        for parameter in self._parameters:
            parameter.grad = None  # so that the graph's own hold them
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            facts = lesson(**self._inputs)
            facts["loss"].backward()
        self._facts = {name: fact.detach() for name, fact in facts.items()}

    def _measured(self, lesson: Lesson, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        facts = lesson(**inputs)
        facts["loss"].backward()
        return {name: fact.detach() for name, fact in facts.items()}
