"""Images are functions of their requests: what ran before, beside or half way leaves no trace in them."""

import numpy as np
import pytest
from PIL import Image
from torch import nn

from klora.errors import RequestError
from klora.form.request import SCHEDULERS
from klora.generation import generate
from test_folder.runs.drawing import asked, pixels


def picture():
    columns, rows = np.meshgrid(np.arange(64), np.arange(64))
    return Image.fromarray(np.stack([columns * 4, rows * 4, (columns + rows) * 2], axis=-1).astype(np.uint8))


def left_half():
    return Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, axis=0).astype(np.uint8))


PATHS = {
    "txt2img": {},
    "img2img": {"image": picture(), "prompt_strength": 0.6},
    "inpaint": {"image": picture(), "mask": left_half(), "prompt_strength": 0.6},
}


def photograph(model):
    """Every part of the pipeline, and the identity and the bits of every tensor in it."""
    parts = {name: part for name, part in model.pipe.components.items() if isinstance(part, nn.Module)}
    return {
        name: (
            [(path, id(module), len(module._forward_pre_hooks)) for path, module in part.named_modules()],
            [(path, id(tensor), tensor.numpy(force=True).tobytes()) for path, tensor in part.named_parameters()],
            [(path, id(tensor), tensor.numpy(force=True).tobytes()) for path, tensor in part.named_buffers()],
        )
        for name, part in parts.items()
    }


def test_run_of_6_steps_leaves_nothing_that_a_run_of_10_would_notice(load, family, model, both):
    alone = generate(load(family), asked(num_inference_steps=10), **both)
    generate(model, asked(num_inference_steps=6), **both)
    after = generate(model, asked(num_inference_steps=10), **both)
    assert np.array_equal(pixels(after), pixels(alone))


@pytest.mark.parametrize("path", PATHS)
def test_batch_of_four_equals_four_single_images_of_the_next_seeds(model, both, path):
    batch = generate(model, asked(num_outputs=4, **PATHS[path]), **both)
    singles = [generate(model, asked(seed=7 + index, **PATHS[path]), **both)[0] for index in range(4)]
    # a level of 255: a batch multiplies its matrices in another order
    np.testing.assert_allclose(pixels(batch), pixels(singles), rtol=0, atol=1)


@pytest.mark.parametrize("path", PATHS)
def test_image_leaves_every_tensor_as_it_was(model, both, engine, path):
    before, engines = photograph(model), []
    generate(model, asked(**PATHS[path]), **both, record=lambda name, value: engines.append((name, value)))
    assert ("engine", engine) in engines
    assert photograph(model) == before


def test_interruption_at_any_step_leaves_every_tensor_and_the_next_image_as_they_were(model, both, engine):
    before, request = photograph(model), asked(num_inference_steps=3)
    undisturbed = pixels(generate(model, request, **both))

    def interrupting(last):
        def on_step(step, steps):
            if step == last:
                raise KeyboardInterrupt

        return on_step

    for last in range(4):
        with pytest.raises(KeyboardInterrupt):
            generate(model, request, **both, on_step=interrupting(last))
        assert photograph(model) == before
        assert np.array_equal(pixels(generate(model, request, **both)), undisturbed)


# Steps, as the sampler counts them


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("family", "scheduler"), [*(("sdxl", name) for name in SCHEDULERS), ("flux", None)], indirect=["family"]
)
def test_steps_are_told_in_order_to_the_last_and_from_where_the_image_enters(model, both, scheduler, path):
    told, strength = [], PATHS[path].get("prompt_strength", 1.0)
    request = asked(scheduler=scheduler, num_inference_steps=5, **PATHS[path])
    generate(model, request, **both, on_step=lambda step, steps: told.append((step, steps)))
    steps = [step for step, _ in told]
    assert {total for _, total in told} == {5}
    assert steps == sorted(steps)
    assert list(dict.fromkeys(steps)) == list(range(steps[0], 6))
    assert steps.count(5) == 1
    redrawn = round(5 * strength)  # Heun calls the denoiser twice a step but for the last
    assert len(steps) - 1 == {"HeunDiscrete": 2 * redrawn - 1, "PNDM": redrawn + 1}.get(scheduler, redrawn)
    entry = round(5 * (1 - strength))
    assert steps[0] == entry - (scheduler == "PNDM" and entry > 0)  # PNDM repeats its second timestep


def test_a_lora_that_a_request_names_and_nobody_gives_is_not_left_out_unsaid(model, both):
    with pytest.raises(RequestError, match=r"^style_lora is named, but style is not given\. Expected what .*\.$"):
        generate(model, asked(content_lora="dog", style_lora="oil"), content=both["content"])
