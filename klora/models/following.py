"""Where a diffusers pipeline is in its steps, for what acts by them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from klora.lora import Step


@contextmanager
def following(pipe: Any, on_step: Callable[[int], Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Call on_step(i) before the denoiser of a diffusers pipeline runs step i of the full schedule, i in [0, steps).

    i is the place of the timestep in the scheduler's list, not a count of calls: image-to-image starts part-way,
    second-order schedulers call twice a step, denoising_end cuts it. Yields the pipeline's `callback_on_step_end`: it
    counts where neither the scheduler nor the denoiser's timestep tells the place. Of pipelines that share a denoiser,
    but no scheduler, follow one at a time: each block hears of every call, and would tell its own pipeline's place."""
    progress: list[Any] = [None, 0]  # of the pipeline's last call: its list of timesteps, and how many steps are over

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scheduler, end = pipe.scheduler, getattr(pipe, "denoising_end", None)  # SDXL's alone have one
        times, total = scheduler.timesteps, len(scheduler.timesteps)
        last = int((times >= round((1 - end) * scheduler.config.num_train_timesteps)).sum()) if end else total
        begin = max(0, last - getattr(pipe, "num_timesteps", last))  # some pipelines tell it uncut, some not at all
        counted = begin + (progress[1] if progress[0] is times else 0)  # each call has a list of its own
        known = [getattr(scheduler, name, None) for name in ("step_index", "begin_index")]
        given = (*args[1:2], kwargs.get("timestep"))  # to U-Nets by its place, to most transformers by its name
        tellers = (known, (_place(time, times) for time in given), [counted])  # the timestep is not always needed
        place = next(at for places in tellers for at in places if at is not None)
        # DDPM does not count timesteps of one's own, and keeps the number of the call before.
        steps = (not getattr(scheduler, "custom_timesteps", False) and scheduler.num_inference_steps) or total
        on_step(Step(place * steps // total, steps))

    def on_step_end(_: Any, index: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        progress[:] = pipe.scheduler.timesteps, index + 1
        return kwargs

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    # Stored by hand, not by register_forward_pre_hook: a cancellation must not fall between a hook and its handle.
    hooks, with_kwargs, key = denoiser._forward_pre_hooks, denoiser._forward_pre_hooks_with_kwargs, object()
    try:
        with_kwargs[key] = True
        hooks[key] = before_forward
        yield on_step_end
    finally:
        hooks.pop(key, None)
        with_kwargs.pop(key, None)


def _place(time: Any, times: Any) -> int | None:
    """Where a timestep is in a list of them that it is a view of, as the denoiser of SDXL has it from its pipelines. By
    address: a value may be there twice, and to compare it would wait for the GPU."""
    if not (isinstance(time, Tensor) and isinstance(times, Tensor)):
        return None
    return next((at for at, other in enumerate(times) if other.data_ptr() == time.data_ptr()), None)
