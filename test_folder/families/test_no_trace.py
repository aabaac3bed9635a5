"""No request leaves a trace in a model, also when it is broken off."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from klora.form.request import SCHEDULERS
from klora.models.family import Family
from test_folder.families.painting import paint, photo


def state(model: Family) -> dict[str, Any]:
    """All that a request could leave behind: weights, buffers, parts, configs, hooks, the scheduler's own fields."""
    pipe = model.pipe
    modules = [pipe.vae, model.denoiser, *model.text_encoders.values()]
    scheduler = {k: v.tolist() if isinstance(v, Tensor) else repr(v) for k, v in vars(pipe.scheduler).items()}
    return {
        "parts": {name: id(part) for name, part in pipe.components.items()},
        "configs": {n: dict(p.config) for n, p in pipe.components.items() if hasattr(p, "register_to_config")},
        "pipeline": {name: id(value) for name, value in vars(pipe).items()},
        "scheduler": scheduler,
        "weights": [(name, float(x.double().sum())) for m in modules for name, x in m.state_dict().items()],
        "hooks": [len(p._forward_hooks) + len(p._forward_pre_hooks) for m in modules for p in m.modules()],
        "modes": [(p.training, type(p)) for m in modules for p in m.modules()],
    }


REQUESTS = {
    "prompt": {},
    "other size": {"width": 96, "seed": 4, "num_outputs": 2},
    "image": {"image": photo(), "prompt_strength": 0.5},
    "mask": {"image": photo(), "mask": Image.new("L", (64, 64), 255), "prompt_strength": 0.5},
    "guidance": {"guidance_scale": 1.0, "prompt": "a cat"},
}


def test_no_request_leaves_a_trace(model: Family) -> None:
    first, before = paint(model), state(model)
    for name, request in REQUESTS.items():
        paint(model, **request)
        assert state(model) == before, name
        assert np.array_equal(paint(model), first), name


def test_no_scheduler_outlives_its_request(sdxl: Family) -> None:
    first, before = paint(sdxl), state(sdxl)
    for scheduler in SCHEDULERS:
        paint(sdxl, scheduler=scheduler)
        assert state(sdxl) == before, scheduler
        assert np.array_equal(paint(sdxl), first), scheduler


def test_a_request_broken_off_leaves_no_trace(model: Family) -> None:
    """As Cog cancels: a BaseException from the middle of denoising."""

    def cancel(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    first, before = paint(model), state(model)
    with pytest.raises(KeyboardInterrupt):
        paint(model, cancel)
    assert state(model) == before
    assert np.array_equal(paint(model), first)
