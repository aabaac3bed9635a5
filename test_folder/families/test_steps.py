"""A step is told as its place in the full schedule, however often a scheduler calls the denoiser."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

from klora.errors import RequestError
from klora.form.request import SCHEDULERS
from klora.fusion import Schedule, fuse
from klora.layers import attached
from klora.lora import LowRank
from klora.models.family import Family
from klora.models.following import following
from test_folder import tiny
from test_folder.families.painting import paint, photo


@pytest.mark.parametrize(
    ("options", "steps"), [({}, [0, 1, 2, 3, 4]), ({"image": photo(), "prompt_strength": 0.5}, [2, 3, 4])]
)
def test_steps_are_told_as_places_in_the_full_schedule_and_by_no_bar(
    model: Family, options: dict[str, Any], steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    paint(model, told.append, **options)
    assert told == steps and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("scheduler", "from_noise", "from_image"),
    [(name, [0, 1, 2, 3], [2, 3]) for name in SCHEDULERS if name not in ("HeunDiscrete", "PNDM")]
    + [
        ("HeunDiscrete", [0, 0, 1, 1, 2, 2, 3], [2, 2, 3]),  # a prediction and its correction; none at the last step
        ("PNDM", [0, 0, 1, 2, 3], [1, 2, 3]),  # corrects its first step; from an image it starts there
    ],
)
def test_step_told_is_the_schedules_though_a_scheduler_calls_twice(
    sdxl: Family, scheduler: str, from_noise: list[int], from_image: list[int]
) -> None:
    told: list[list[int]] = [[], []]
    paint(sdxl, told[0].append, scheduler=scheduler)
    paint(sdxl, told[1].append, scheduler=scheduler, image=photo(), prompt_strength=0.5)
    assert told == [[*from_noise, 4], [*from_image, 4]]


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (StableDiffusionXLPipeline, {"denoising_end": 0.5}, [0, 1]),
        (StableDiffusionXLImg2ImgPipeline, {"denoising_start": 0.2, "denoising_end": 0.7}, [1, 2, 3]),
        (StableDiffusionXLImg2ImgPipeline, {"denoising_start": 0.5}, [2, 3, 4, 5]),
    ],
)
def test_steps_of_a_pipeline_that_leaves_the_last_ones_to_a_refiner_are_the_schedules(
    sdxl: Family, kind: Any, options: dict[str, float], steps: list[int]
) -> None:
    told: list[int] = []
    image = {} if kind is StableDiffusionXLPipeline else {"image": torch.zeros(1, 4, 8, 8)}
    pipe = kind(**sdxl.pipe.components)
    with following(pipe, told.append) as on_step_end:
        pipe("a dog", num_inference_steps=6, callback_on_step_end=on_step_end, output_type="latent", **image, **options)
    assert told == steps


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_a_control_net_begins_at_the_first_step_though_it_leaves_the_last_ones_to_a_refiner(
    sdxl: Family, scheduler: Any
) -> None:
    """Its pipeline tells how many timesteps there are before it leaves any out."""
    told: list[int] = []
    own = {"controlnet": ControlNetModel.from_unet(sdxl.pipe.unet), "scheduler": scheduler(timestep_spacing="leading")}
    pipe = StableDiffusionXLControlNetPipeline(**sdxl.pipe.components | own)
    with following(pipe, told.append) as on_step_end:
        options: dict[str, Any] = {"callback_on_step_end": on_step_end, "output_type": "latent"}
        pipe("a dog", image=photo(), num_inference_steps=6, denoising_end=0.5, **options)
    assert told == [0, 1]


def test_a_pipeline_that_calls_nobody_back_is_followed_by_its_scheduler(sdxl: Family) -> None:
    told: list[int] = []
    adapter = T2IAdapter(3, [16, 32, 32, 32], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl")
    pipe = StableDiffusionXLAdapterPipeline(**sdxl.pipe.components, adapter=adapter)
    with following(pipe, told.append):
        pipe("a dog", image=photo(), num_inference_steps=3, output_type="latent")
    assert told == [0, 1, 2]


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(DDIMScheduler, [0, 1, 2, 3]), (DDPMScheduler, [0, 1, 2, 3]), (PNDMScheduler, [0, 0, 1, 2, 3])],
)
def test_a_scheduler_that_does_not_know_its_place_is_followed_by_timesteps_where_nobody_is_called_back(
    sdxl: Family, scheduler: Any, steps: list[int]
) -> None:
    told: list[int] = []
    own = {"scheduler": scheduler.from_config(sdxl.pipe.scheduler.config, skip_prk_steps=True)}
    pipe = StableDiffusionXLPipeline(**sdxl.pipe.components | own)
    with following(pipe, told.append):
        pipe("a dog", num_inference_steps=4, output_type="latent")
    assert told == steps


def test_timesteps_of_ones_own_are_counted_by_their_list(sdxl: Family) -> None:
    """Of these DDPM does not know how many there are, but how many there were in the call before."""
    told: list[tuple[int, int]] = []
    scheduler = DDPMScheduler.from_config(sdxl.pipe.scheduler.config)
    pipe = StableDiffusionXLPipeline(**sdxl.pipe.components | {"scheduler": scheduler})
    with following(pipe, lambda step: told.append((step, step.steps))) as on_step_end:
        options: dict[str, Any] = {"callback_on_step_end": on_step_end, "output_type": "latent"}
        for times in ({"timesteps": [900, 500, 100]}, {"num_inference_steps": 2}, {"timesteps": [900, 500, 100]}):
            pipe("a dog", **times, **options)
    assert told == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("planned", [3, 5])
def test_a_pipeline_that_runs_another_number_of_steps_than_were_planned_is_refused(model: Family, planned: int) -> None:
    layer = next(name for name, part in model.denoiser.named_modules() if isinstance(part, torch.nn.Linear))
    rows, columns = model.denoiser.get_submodule(layer).weight.shape
    pair = LowRank(torch.ones(1, columns), torch.ones(rows, 1))
    fusion = fuse({layer: pair}, {layer: pair})
    with attached(model.denoiser, fusion, Schedule.from_pattern("s"), steps=planned) as gate:
        with pytest.raises(RequestError, match=f"Step 0 of 4, but {planned} are planned"):
            paint(model, gate.set_step)
        if planned == 3:
            paint(model, gate.set_step, num_inference_steps=3)


def test_a_denoiser_that_is_called_before_its_scheduler_has_steps_is_told_of_all_timesteps(sdxl: Family) -> None:
    """Which no plan has."""
    told: list[tuple[int, int]] = []
    pipe = StableDiffusionXLPipeline(**sdxl.pipe.components | {"scheduler": DDIMScheduler()})
    with following(pipe, lambda step: told.append((step, step.steps))):
        pipe.unet(**tiny.unet_inputs(pipe.unet))
    assert told == [(0, 1000)]


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_a_call_after_one_that_was_broken_off_begins_at_its_own_first_step(sdxl: Family, scheduler: Any) -> None:
    told: list[int] = []
    pipe = StableDiffusionXLPipeline(
        **sdxl.pipe.components | {"scheduler": scheduler.from_config(sdxl.pipe.scheduler.config)}
    )

    def broken_off(index: int) -> None:
        told.append(index)
        if len(told) == 3:
            raise KeyboardInterrupt

    with following(pipe, broken_off) as on_step_end:
        options: dict[str, Any] = {"callback_on_step_end": on_step_end, "output_type": "latent"}
        with pytest.raises(KeyboardInterrupt):
            pipe("a dog", num_inference_steps=4, **options)
        pipe("a dog", num_inference_steps=2, **options)
    assert told == [0, 1, 2, 0, 1]


def test_calls_that_share_a_block_begin_at_their_own_first_steps(sdxl: Family) -> None:
    told: list[int] = []
    pipe = StableDiffusionXLPipeline(**sdxl.pipe.components)
    with following(pipe, told.append) as on_step_end:
        for steps in (2, 3):
            pipe("a dog", num_inference_steps=steps, callback_on_step_end=on_step_end, output_type="latent")
    assert told == [0, 1, 0, 1, 2]


def test_a_scheduler_that_is_told_where_to_begin_is_believed() -> None:
    """Of a pipeline that tells nobody how many timesteps are left."""
    steps: list[int] = []
    scheduler = SimpleNamespace(timesteps=[3, 2, 1], num_inference_steps=3, step_index=None, begin_index=1)
    pipe = SimpleNamespace(transformer=torch.nn.Identity(), scheduler=scheduler)
    with following(pipe, steps.append):
        pipe.transformer(torch.zeros(1))
    assert steps == [1]


def test_step_is_the_schedules_not_the_count_of_forwards() -> None:
    """A pipeline may call its denoiser twice a step, once for the prompt and once for what to steer away from."""
    denoiser, steps = torch.nn.Identity(), []
    scheduler = SimpleNamespace(timesteps=[3, 2, 1], num_inference_steps=3)
    pipe = SimpleNamespace(transformer=denoiser, scheduler=scheduler, num_timesteps=2)  # an image enters at the second
    with following(pipe, steps.append) as on_step_end:
        for index in range(2):
            denoiser(torch.zeros(1))
            denoiser(torch.zeros(1))
            on_step_end(pipe, index, scheduler.timesteps[index + 1], {})
        scheduler.timesteps = [3, 2, 1]  # of the pipeline's next call
        denoiser(torch.zeros(1))
    assert steps == [1, 1, 2, 2, 1]


class TimedDenoiser(torch.nn.Module):
    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample


def test_a_timestep_that_is_given_by_its_name_tells_the_place() -> None:
    """As PixArt's pipelines give it, which call nobody back."""
    steps: list[int] = []
    denoiser, times = TimedDenoiser(), torch.tensor([3, 2, 1])
    pipe = SimpleNamespace(transformer=denoiser, scheduler=SimpleNamespace(timesteps=times, num_inference_steps=3))
    with following(pipe, steps.append):
        for time in times:
            denoiser(torch.zeros(1), timestep=time[None].expand(2))
    assert steps == [0, 1, 2]
    assert not denoiser._forward_pre_hooks and not denoiser._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    ("times", "time"), [([3, 2, 1], torch.tensor(2)), (torch.tensor([3, 2, 1]), 2), ([3, 2, 1], 2)], ids=str
)
def test_steps_are_counted_where_timesteps_have_no_address(times: Any, time: Any) -> None:
    steps: list[int] = []
    pipe = SimpleNamespace(unet=TimedDenoiser(), scheduler=SimpleNamespace(timesteps=times, num_inference_steps=3))
    with following(pipe, steps.append) as on_step_end:
        for index in range(2):
            pipe.unet(torch.zeros(1), time)
            on_step_end(pipe, index, time, {})
    assert steps == [0, 1]
