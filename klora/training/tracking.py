"""A training as Weights & Biases sees it, for those who ask for it. Imports wandb when asked, and no sooner."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from klora.errors import RequestError
from klora.training.loop import OnProgress, Progress


@contextmanager
def tracked(
    key: str, project: str, name: str | None, entity: str | None, facts: Mapping[str, Any]
) -> Iterator[OnProgress]:
    """A listener that sends each report to a run of this project; facts: what the run is told of itself.

    The key goes into this run's settings, not into the machine's login. Raises RequestError.
    """
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise RequestError("wandb_api_key is given and wandb is not installed. Install it, or leave it out.") from error
    try:
        settings = wandb.Settings(api_key=key, silent=True)
        run = wandb.init(project=project, name=name, entity=entity, config=dict(facts), settings=settings)
    except Exception as error:  # wandb's own, for a key, a name, a network; not chained, because they may quote the key
        said = str(error).replace(key, "...")
        raise RequestError(f"wandb_api_key cannot be used: {said}. Expected a key of wandb.ai, or none.") from None

    def on_progress(progress: Progress) -> None:
        values = {"loss": progress.loss, "fixed_loss": progress.fixed_loss, "learning_rate": progress.learning_rate,
                  "steps_per_second": progress.steps_per_second}  # fmt: skip
        run.log({name: value for name, value in values.items() if value is not None}, step=progress.step)

    exit_code = 1
    try:
        yield on_progress
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)
