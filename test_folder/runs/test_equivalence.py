"""Whole runs: the fast engines against the published method done naively, and against diffusers' own loader."""

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from klora.fusion import Schedule, fuse
from klora.generation import combine, generate
from klora.generation.acting import acting_loras, encoder_plan
from klora.layers import attached
from test_folder import tiny
from test_folder.fusion.drawn import naive_gamma, naive_sums
from test_folder.runs.drawing import ENGINES, SENTENCE, STEPS, asked, pixels, random_lora


class Naive:
    """The published method with one tau a step: dense products, full sorts, and the choice at every layer call."""

    def __init__(self, content, style, pattern, steps):
        self.content, self.style, self.pattern, self.steps = content, style, pattern, steps
        self.step, self.style_acted = 0, []
        sums = naive_sums(content, style)
        self.sums, self.gamma = dict(zip(content, sums, strict=True)), naive_gamma(sums)

    def delta(self, name):
        alpha, beta = {"s": (1.5, 0.5), "s*": (1.5, 1.275)}[self.pattern]
        scale = alpha * (self.step + 0.5) / self.steps + beta
        if self.pattern == "s*":
            scale %= alpha
        content_sum, style_sum = self.sums[name][:2]
        with np.errstate(divide="ignore"):  # the scale of s* is zero for a moment
            content_acts = (content_sum / self.gamma) / (style_sum * np.float64(scale)) > 1
        self.style_acted.append(not content_acts)
        pair = self.content[name] if content_acts else self.style[name]
        return pair.B @ pair.A

    def run(self, model, denoise):
        """What denoise(on_step) returns while every layer of the model computes x (W + dW)^T + b."""

        def instead(name):
            return lambda linear, args, _: F.linear(args[0], linear.weight + self.delta(name), linear.bias)

        hooks = [model.get_submodule(name).register_forward_hook(instead(name)) for name in self.content]
        result = denoise(lambda step: setattr(self, "step", step))
        for hook in hooks:
            hook.remove()
        return result


# Whole runs of the published models' topology, in a loop of our own

UNET = (tiny.full_topology_unet, tiny.unet_inputs, "sample", r"\.attn[12]\.to_(q|k|v|out\.0)$", 560)
FLUX = (tiny.full_topology_flux, tiny.flux_inputs, "hidden_states", r"^(single_)?transformer_blocks\.", 494)


def euler(model, inputs, latents_name, steps, on_step):
    """The final latents of a plain Euler loop over t = 1 ... 0; on_step(i) is called before step i."""
    latents, middle = inputs[latents_name], inputs["timestep"]
    for step in range(steps):
        on_step(step)
        now = {"timestep": 2 * middle * (1 - step / steps), latents_name: latents}
        latents = latents - model(**inputs | now).sample / steps
    return latents


@pytest.mark.parametrize("pattern", ["s", "s*"])
@pytest.mark.parametrize(("build", "inputs", "latents", "layers", "count"), [UNET, FLUX], ids=["sdxl", "flux"])
@torch.no_grad()
def test_whole_run_in_both_engines_equals_dense_weights_chosen_at_every_layer_call(
    build, inputs, latents, layers, count, pattern
):
    model, steps = build(), 4
    content, style = random_lora(model, 4, seed=1, pattern=layers), random_lora(model, 8, seed=2, pattern=layers)

    def denoise(on_step):
        return euler(model, inputs(model), latents, steps, on_step)

    naive = Naive(content, style, pattern, steps)
    expected = naive.run(model, denoise)
    assert len(naive.style_acted) == count * steps
    assert 0.1 < np.mean(naive.style_acted) < 0.9
    for engine in ENGINES:
        with attached(model, fuse(content, style), Schedule.from_pattern(pattern), steps=steps, engine=engine) as gate:
            # 1e-5: float32, latents of about 1, sums in another order
            torch.testing.assert_close(denoise(gate.set_step), expected, rtol=0, atol=1e-5)


# Images, through diffusers' own pipelines


def stock_pipeline(bases, family):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(bases / tiny.BASES[family])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_image(pipeline, steps, **options):
    generator = torch.Generator().manual_seed(7)
    return pipeline(SENTENCE, height=64, width=64, num_inference_steps=steps, generator=generator, **options).images


@pytest.fixture(scope="module")
def dense(bases, family, model, files):
    """By pattern: the image of 8 steps, with dense weights chosen at every layer call."""
    steps, pipeline = 8, stock_pipeline(bases, family)
    content, style = (model.read_lora(path) for path in files.values())

    def denoise(on_step):
        def callback(_, index, __, kwargs):
            on_step(index + 1)
            return kwargs

        on_step(0)
        guidance_scale = model.guidance_scale
        return stock_image(pipeline, steps, callback_on_step_end=callback, guidance_scale=guidance_scale)

    with torch.no_grad():
        denoiser = getattr(pipeline, model.component)
        return {pattern: Naive(content, style, pattern, steps).run(denoiser, denoise) for pattern in ("s", "s*")}


@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_image_equals_that_of_dense_weights_chosen_at_every_layer_call(model, files, engine, dense, pattern):
    content, style = (model.read_lora(path) for path in files.values())
    images = generate(model, asked(pattern=pattern, num_inference_steps=8), content=content, style=style)
    np.testing.assert_allclose(pixels(images), pixels(dense[pattern]), rtol=0, atol=1)  # a level of 255, for rounding


@pytest.fixture(scope="module")
def stock(bases, family, model, files):
    """By role: the image of that LoRA alone, as diffusers' own loader applies it."""
    images, pipeline = {}, stock_pipeline(bases, family)
    for role, path in files.items():
        pipeline.load_lora_weights(path)
        images[role] = stock_image(pipeline, STEPS, guidance_scale=model.guidance_scale)
        pipeline.unload_lora_weights()
    return images


@pytest.mark.parametrize("role", ["content", "style"])
def test_image_of_one_lora_equals_that_of_diffusers_own_loader(model, files, engine, stock, role):
    read = {name: model.read_lora(path) for name, path in files.items()}
    for request, given in ((asked(fusion=role), read), (asked(), {role: read[role]})):
        images = generate(model, request, **given)
        np.testing.assert_allclose(pixels(images), pixels(stock[role]), rtol=0, atol=1)  # a level, for rounding


def test_fusions_make_different_images(model, both):
    images = [pixels(generate(model, asked(fusion=fusion), **both)) for fusion in ("klora", "sum", "content", "style")]
    images += [pixels(generate(model, asked(pattern="s"), **both)), pixels(generate(model, asked()))]
    for index, image in enumerate(images):
        assert all(abs(image - other).max() > 8 for other in images[:index])


@pytest.mark.parametrize(
    ("fusion", "scales"), [("sum", [2.0, 0.5]), ("content", [2.0]), ("style", [0.5])], ids=["sum", "content", "style"]
)
def test_without_a_choice_each_lora_acts_at_its_own_scale(both, fusion, scales):
    plan = combine(asked(fusion=fusion, content_scale=2.0, style_scale=0.5), 8, **both)
    assert torch.equal(plan.gates, torch.tensor(scales).expand(1, len(plan.layers), len(scales)))


def test_in_the_text_encoders_each_lora_acts_at_its_own_scale(model, both):
    acting = acting_loras(asked(content_scale=2.0, style_scale=0.5), **both)
    for component in model.text_encoders:
        plan = encoder_plan(acting, component)
        assert plan.loras == tuple(lora.text_encoders[component] for lora in both.values())
        assert torch.equal(plan.gates, torch.tensor([2.0, 0.5]).expand(1, len(plan.layers), 2))


def test_every_input_of_the_choice_steers_it_and_each_lora_acts_at_its_own_scale(both):
    inputs = {"pattern": "s", "alpha": 2.0, "beta": 0.25, "style_bias": 1.3}
    plan = combine(asked(content_scale=2.0, style_scale=0.5, **inputs), 8, **both)
    wins = fuse(both["content"], both["style"]).content_wins(Schedule(2.0, 0.25, wraps=False), 8, style_bias=1.3)
    assert 0.1 < wins.float().mean() < 0.9
    assert torch.equal(plan.gates, torch.where(wins[..., None], torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.5])))
