"""A training run as it stands: what is trained, by which optimiser, how far. Written to one file, and taken up from it.

Draws are keyed by their number (training.cache), so the step says where all of them stand.
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
"""(module, class, options) by the form's name; imported when asked for."""
# What reading a file raises that is no saved run. RuntimeError is also RecursionError's.
NO_RUN = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError)


@dataclass
class Run:
    """layers: float32 parameters.   scale: alpha / rank.   step: steps done.   whole: false while a step is taken, or
    the mean is where the parameters belong, when what is here belongs to no step."""

    layers: Mapping[str, LowRank]
    scale: float
    optimizer: Optimizer
    schedule: Any  # torch's LRScheduler, as diffusers makes it
    ema: Any  # diffusers' EMAModel, or None
    step: int = 0
    whole: bool = True

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [factor for pair in self.layers.values() for factor in (pair.A, pair.B)]

    @property
    def finite(self) -> bool:
        """Whether all of it is numbers."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all())

    def advance(self, max_grad_norm: float) -> None:
        """Take one step by the gradients that have gathered. max_grad_norm: 0 leaves them as they are.

        An interruption is raised when the step is whole: optimisers wait in it for the GPU, so that most come there.
        """
        if max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        interruptible(self._move)
        self.optimizer.zero_grad(set_to_none=True)

    def _move(self) -> None:
        """All of the step that may not be left half done."""
        with torch.cuda.device_of(self.parameters[0]):  # which is each thread's own; without CUDA it does nothing
            self.whole = False
            self.optimizer.step()
            self.schedule.step()
            if self.ema:
                self.ema.step(self.parameters)
            self.step += 1
            self.whole = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the running mean, where there is one, in the parameters' place."""
        if self.ema is None:
            yield
            return
        own = [parameter.detach().clone() for parameter in self.parameters]
        self.whole = False
        try:
            self.ema.copy_to(self.parameters)
            yield
        finally:
            for parameter, kept in zip(self.parameters, own, strict=True):
                parameter.data.copy_(kept)
            self.whole = True

    def lora(self) -> LoRA:
        """What has been learnt, on the CPU, alpha folded into B."""
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
        """Take a run up where save() left it. Raises RequestError."""
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
        """The rates of this step by the law as it is now: the optimiser's are those of a law that may have ended."""
        groups = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, rate, law in groups:
            group["lr"] = rate * law(self.schedule.last_epoch)

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
    """What the header of a saved run says, and its file. Raises RequestError, within it too, for what is no run."""
    try:
        with safe_open(path, framework="pt") as file:
            yield json.loads(file.metadata()["run"]), file
    except NO_RUN as error:
        raise RequestError(f"resume_from cannot be taken up: {error}. Expected the tar of a training.") from error


def new_run(layers: Mapping[str, LowRank], config: TrainConfig, learning_rate: float, scale: float) -> Run:
    """A run at step 0. Raises RequestError when the optimiser's library is not there."""
    parameters = [factor for pair in layers.values() for factor in (pair.A, pair.B)]
    options = OPTIMIZERS[config.optimizer][2]
    rate, decay = config.rate(learning_rate), config.weight_decay
    optimizer = require_optimizer(config)(parameters, lr=rate, weight_decay=decay, **options)
    law = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(law, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.steps)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True) if config.ema_decay else None
    return Run(layers, scale, optimizer, schedule, ema)


def require_optimizer(config: TrainConfig) -> Any:  # Any: a torch optimiser class, whose options are its own
    """The optimiser's class. Raises RequestError when its library is not there."""
    module, name, _ = OPTIMIZERS[config.optimizer]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        library = module.partition(".")[0]
        raise RequestError(
            f"optimizer is {config.optimizer} and {library} is not installed. Expected adamw."
        ) from error


def _flattened(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON can hold it, its tensors put aside under the names of their places."""
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
