"""A stage of a training that takes hours: its steps counted, its log kept, a file left to go on from."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_SECONDS, REPORT_STEPS = 120, 50


class Stage:
    """What every stage shares: steps counted, a log, and a file to go on from."""

    def __init__(
        self, name: str, steps: int, modules: Mapping[str, nn.Module], rate: float | Mapping[str, float], folder: Path
    ) -> None:
        """rate: the learning rate at its height, of all modules or of each."""
        self.name, self.steps, self.modules, self.folder = name, steps, modules, folder
        rates = rate if isinstance(rate, Mapping) else dict.fromkeys(modules, rate)
        learning = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
        self.parameters = parameters = [p for own in learning.values() for p in own]
        groups = [{"params": own, "lr": rates[name]} for name, own in learning.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
        law = lambda step: min(1.0, (step + 1) / 100) * max(0.02, 1 - step / steps) ** 0.7  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, law)
        self.averages = [parameter.detach().clone() for parameter in parameters]
        self.step, self._saved, self._began = 0, time.monotonic(), time.monotonic()
        if self._path.is_file():
            self._load()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def run(self) -> Iterator[int]:
        """The numbers of the steps to take; saves in between."""
        while self.step < self.steps:
            yield self.step
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        self.save()

    def advance(self, loss: Tensor, **facts: float) -> None:
        """Take a step by this loss, which is logged with the facts."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        decay = min(0.999, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        if self.step % REPORT_STEPS == 0:
            line = {"stage": self.name, "step": self.step, "loss": round(float(loss.detach()), 5), **facts}
            line["seconds"] = round(time.monotonic() - self._began, 1)
            print(json.dumps(line), flush=True)
            with (self.folder / f"{self.name}.jsonl").open("a") as log:
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

    def finish(self, beside: Path) -> None:
        """Leave the running means, which draw best, in the modules, and a tenth of the log in a folder."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data.copy_(average)
        lines = (self.folder / f"{self.name}.jsonl").read_text().splitlines()[9::10]
        (beside / f"{self.name}.jsonl").write_text("\n".join(lines) + "\n")
