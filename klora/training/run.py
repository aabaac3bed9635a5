"""The state of a training run: factors, optimiser, schedule, steps done. It is written to one file, and read from it.

It has no generators: draws are keyed by their number (training.cache), which follows from the step.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from klora.errors import RequestError
from klora.interruptible import interruptible
from klora.lora import LoRA, LowRank, save_tensors
from klora.training.config import TrainConfig
from klora.training.writing import whole

OPTIMIZERS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim", "AdamW", {"fused": True}),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "prodigy": ("prodigyopt", "Prodigy", {"safeguard_warmup": True, "use_bias_correction": True}),
    "lion": ("lion_pytorch", "Lion", {}),
    # By itself it scales a step with its parameter's size, a thousandth at least, and B begins at 0.
    "adafactor": ("torch.optim", "Adafactor", {"eps": (None, 1.0)}),
}
"""{the form's name: (module, class, options)}; a module is imported when its optimiser is chosen."""
# What reading a file that is no saved run may raise. RuntimeError covers RecursionError.
NO_RUN = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError)


@dataclass
class Run:
    """layers: {module name: pair of float32 parameters}.   scale: alpha / rank.   step: steps done.   consistent:
    whether all is as after that step: not while the next is taken, nor in averaged()."""

    layers: Mapping[str, LowRank]
    scale: float
    optimizer: Optimizer
    schedule: Any  # torch's LRScheduler, as diffusers makes it
    ema: Any  # diffusers' EMAModel, or None
    step: int = 0
    consistent: bool = True

    @property
    def parameters(self) -> list[Tensor]:
        """A and B of each layer in turn."""
        return [factor for pair in self.layers.values() for factor in (pair.A, pair.B)]

    @property
    def finite(self) -> bool:
        """Whether no parameter has a NaN or an infinity."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all())

    def advance(self, max_grad_norm: float) -> None:
        """Take one step by the accumulated gradients. max_grad_norm: they are clipped to it; 0 leaves them as they are.

        An interruption is raised after the step: most would come within it, where optimisers wait for the GPU.
        """
        if max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        interruptible(self._move)
        self.optimizer.zero_grad(set_to_none=True)

    def _move(self) -> None:
        """The part of the step that may not be left half done."""
        with torch.cuda.device_of(self.parameters[0]):  # each thread has a current device; without CUDA a no-op
            self.consistent = False
            self.optimizer.step()
            self.schedule.step()
            if self.ema:
                self.ema.step(self.parameters)
            self.step += 1
            self.consistent = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the parameters have the values of their moving average (EMA), if there is one."""
        if self.ema is None:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self.consistent = False
        try:
            self.ema.copy_to(self.parameters)
            yield
        finally:
            for parameter, value in zip(self.parameters, trained, strict=True):
                parameter.data.copy_(value)
            self.consistent = True

    def lora(self) -> LoRA:
        """The LoRA after this step, of averages where there are any; on the CPU, with scale folded into B."""
        with self.averaged():
            pairs = {name: (pair.A.detach().cpu().clone(), pair.B.detach().cpu()) for name, pair in self.layers.items()}
            return LoRA({name: LowRank(A, B * self.scale) for name, (A, B) in pairs.items()})

    def save(self, path: Path) -> None:
        """Write the run to one file, which appears whole. Raises RequestError."""
        tensors: dict[str, Tensor] = {}
        facts = {"step": self.step, "state": _flattened(self._state(), "", tensors)}
        with whole(path) as part:
            save_tensors(part, tensors, {"run": json.dumps(facts)})

    def load(self, path: Path) -> None:
        """Set this run, of the same layers and settings, to the state that save() wrote. Raises RequestError."""
        with _saved(path) as (facts, file):
            state, step = _unflattened(facts["state"], file), int(facts["step"])
            with torch.no_grad():
                for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                    parameter.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self._follow_schedule()
            if self.ema:
                self.ema.load_state_dict(state["ema"])
                self.ema.to(self.parameters[0].device)
        self.step = step

    def _follow_schedule(self) -> None:
        """Set the learning rates by this run's schedule: those that were loaded are of the saved run's, which may have
        been for fewer steps."""
        groups = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, rate, factor in groups:
            group["lr"] = rate * factor(self.schedule.last_epoch)

    def _state(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }


def saved_step(path: Path) -> int:
    """How many steps a saved run has done. Raises RequestError."""
    with _saved(path) as (facts, _):
        return int(facts["step"])


@contextmanager
def _saved(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """(header, open file) of a saved run. Raises RequestError for what is no saved run, also where that shows only in
    the block."""
    try:
        with safe_open(path, framework="pt") as file:
            yield json.loads(file.metadata()["run"]), file
    except NO_RUN as error:
        raise RequestError(f"resume_from cannot be taken up: {error}. Expected the tar of a training.") from error


def new_run(layers: Mapping[str, LowRank], config: TrainConfig, learning_rate: float, scale: float) -> Run:
    """A run at step 0. learning_rate: the base's; scale: alpha / rank. Raises RequestError as require_optimizer()."""
    parameters = [factor for pair in layers.values() for factor in (pair.A, pair.B)]
    options = OPTIMIZERS[config.optimizer][2]
    rate, decay = config.rate(learning_rate), config.weight_decay
    optimizer = require_optimizer(config)(parameters, lr=rate, weight_decay=decay, **options)
    kind = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True) if config.ema_decay else None
    return Run(layers, scale, optimizer, schedule, ema)


def require_optimizer(config: TrainConfig) -> Any:  # Any: a torch optimiser class, whose options are its own
    """The class of the config's optimiser. Raises RequestError when its library is not installed."""
    module, name, _ = OPTIMIZERS[config.optimizer]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        library = module.partition(".")[0]
        raise RequestError(
            f"optimizer is {config.optimizer} and {library} is not installed. Expected adamw."
        ) from error


def _flattened(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The value for JSON; its tensors go into `tensors`, each under its place, a path such as ".optimizer.state"."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().clone()
        return {"tensor": place}
    if isinstance(value, dict):
        return {"items": [[key, _flattened(part, f"{place}.{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_flattened(part, f"{place}.{index}", tensors) for index, part in enumerate(value)]
    return value


def _unflattened(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unflattened(part, file) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return file.get_tensor(value["tensor"])
        return {key: _unflattened(part, file) for key, part in value["items"]}
    return value
