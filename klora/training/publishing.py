"""Where a training is shown besides its tar: the Hugging Face hub and Weights & Biases, for those who ask for it."""

import dataclasses
import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.errors import KLoRAError, RequestError
from klora.form.fields import ask, check
from klora.interruptible import interruptible
from klora.training.config import TrainConfig, ineffective
from klora.training.hub import check_repo_id, push

if TYPE_CHECKING:  # a form needs no torch
    from klora.training.loop import OnProgress, Progress

logger = logging.getLogger(__name__)

NO_EFFECT = {
    "hf_token": ("hf_repo_id", ("",)), "hf_private": ("hf_repo_id", ("",)), "wandb_project": ("wandb_api_key", ("",)),
    "wandb_run": ("wandb_api_key", ("",)), "wandb_entity": ("wandb_api_key", ("",)),
}  # fmt: skip
"""{setting: (another one, its values with which the first has no effect)}"""


@dataclass(frozen=True, repr=False)  # it holds secrets
class Publishing:
    """The settings of where to show a training, checked on creation. Raises RequestError."""

    hf_repo_id: str = ask("", "Hugging Face repository, owner/name, to which the LoRA is uploaded.")
    hf_token: str = ask("", "Hugging Face token with the right to write there.")
    hf_private: bool = ask(True, "Make the repository private; an existing public one is refused.")
    wandb_api_key: str = ask("", "Weights & Biases key, to report the training there.")
    wandb_project: str = ask("klora", "Weights & Biases project.")
    wandb_run: str = ask("", "Name of the Weights & Biases run. Default: one that it makes up.")
    wandb_entity: str = ask("", "Weights & Biases user or team. Default: the key's.")

    def __post_init__(self) -> None:
        check(self)
        if self.hf_repo_id:
            check_repo_id(self.hf_repo_id)
            if not self.hf_token:
                raise RequestError(f"hf_repo_id is {self.hf_repo_id!r} but hf_token is not given. Give it, too.")
            if not re.fullmatch("[!-~]+", self.hf_token):  # no header can carry it, and the HTTP library would quote it
                seen = f"hf_repo_id is {self.hf_repo_id!r}, but hf_token has a space or an odd letter in it"
                raise RequestError(f"{seen}. Expected a token.")

    @property
    def remarks(self) -> list[str]:
        """A sentence for each setting that has no effect, as TrainConfig's."""
        return ineffective(self, NO_EFFECT)

    @contextmanager
    def tracked(self, config: TrainConfig) -> "Iterator[OnProgress]":
        """A listener that sends each report to Weights & Biases, if that was asked for.

        The key goes into this run's settings, not into the machine's login. Raises RequestError where reporting cannot
        begin; errors that come later are logged.
        """
        if not (key := self.wandb_api_key):
            yield lambda progress: None
            return
        try:
            # Where its import is interrupted, it stays half imported, and every later training fails.
            wandb: Any = interruptible(partial(importlib.import_module, "wandb"))
        except ImportError as error:
            reason = "wandb_api_key is given and wandb is not installed"
            raise RequestError(f"{reason}. Install it, or leave it out.") from error
        names = {"project": self.wandb_project, "name": self.wandb_run or None, "entity": self.wandb_entity or None}
        with _translated(key):
            settings = wandb.Settings(api_key=key, silent=True)
            run = wandb.init(**names, config=dataclasses.asdict(config), settings=settings)

        def on_progress(progress: "Progress") -> None:
            values = {"loss": progress.loss, "fixed_loss": progress.fixed_loss, "learning_rate": progress.learning_rate,
                      "steps_per_second": progress.steps_per_second}  # fmt: skip
            with _survived(key):
                run.log({name: value for name, value in values.items() if value is not None}, step=progress.step)

        exit_code = 1
        try:
            yield on_progress
            exit_code = 0
        finally:
            with _survived(key):
                run.finish(exit_code=exit_code)

    def push(self, folder: Path) -> None:
        """Upload the folder, if that was asked for. An error is logged and not raised, because the tar has all that was
        trained."""
        if self.hf_repo_id:
            try:
                logger.info("uploaded to %s", push(folder, self.hf_repo_id, self.hf_token, self.hf_private))
            except KLoRAError as error:
                logger.error("%s What was trained is in the tar.", error)


@contextmanager
def _translated(key: str) -> "Iterator[None]":
    """Have every error of wandb's in the block raised as a RequestError."""
    try:
        yield
    except Exception as error:  # its own, for a key, a name, a network; not chained, because they may quote the key
        reason = str(error).replace(key, "...")
        raise RequestError(f"wandb_api_key cannot be used: {reason}. Expected a key of wandb.ai, or none.") from None


@contextmanager
def _survived(key: str) -> "Iterator[None]":
    """Have every error of wandb's in the block logged, and not raised: the training goes on without it."""
    try:
        with _translated(key):
            yield
    except KLoRAError as error:
        logger.error("%s", error)
