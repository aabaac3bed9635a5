"""A whole image with a LoRA file is the one that diffusers makes with its own loader."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from klora.form.request import Request
from klora.layers import attached
from klora.lora import LoRA, Plan
from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import read
from test_folder.files.spelling import KOHYA, bfl_modules, keyed, sgm, spelled


def picture(model: Family, lora: LoRA) -> np.ndarray:
    """Levels [64, 64, 3] in 0 .. 255 of one image with one LoRA everywhere."""
    with torch.no_grad(), ExitStack() as loans:
        for component, encoder in model.text_encoders.items():
            part = lora.text_encoders.get(component, {})
            loans.enter_context(attached(encoder, Plan.constant((part,), (1.0,))))
        conditioning = model.encode_prompt(["a photo of a sks dog"])
        loans.enter_context(attached(model.denoiser, Plan.constant((lora,), (1.0,))))
        request = Request("a photo of a sks dog", num_inference_steps=4, seed=3)
        return np.asarray(model.sample(conditioning, request, lambda step: None)[0], dtype=int)


def diffusers_picture(pipeline: DiffusionPipeline, path: Path, guidance_scale: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path)
    call = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "width": 64, "height": 64}
    image = pipeline("a photo of a sks dog", generator=torch.Generator().manual_seed(3), **call).images[0]
    return np.asarray(image, dtype=int)


def kohya_encoder(number: int, encoder: nn.Module) -> dict[str, Tensor]:
    """A text encoder's attention and feed-forward layers as kohya writes them; diffusers skips the projection."""
    layers = tiny.random_lora(tiny.linear_shapes(encoder), 2, seed=number, std=0.3, alpha=1.0)
    flat = {
        f"lora_te{number}_text_model_{n.removeprefix('text_model.').replace('.', '_')}": f for n, f in layers.items()
    }
    flat = {stem: factors for stem, factors in flat.items() if "_layers_" in stem}
    alphas = {f"{stem}.alpha": torch.tensor(1.0) for stem in flat}
    return alphas | {key: x for stem, factors in flat.items() for key, x in keyed(stem, factors, KOHYA).items()}


def diffusers_file(model: Family, encoders: list[str]) -> dict[str, Tensor]:
    tensors = spelled(tiny.random_lora(tiny.linear_shapes(model.denoiser), 4, seed=1), model.component, "diffusers")
    for component in encoders:
        layers = tiny.random_lora(tiny.linear_shapes(model.text_encoders[component]), 2, seed=2, std=0.3)
        tensors |= spelled(layers, component, "diffusers")
    return tensors


def kohya_file(model: Family, encoders: list[str]) -> dict[str, Tensor]:
    """One alpha and the layers of the blocks: diffusers mixes up different alphas and the embeddings' names."""
    shapes = tiny.linear_shapes(model.denoiser)
    if model.component == "unet":
        shapes = {n: s for n, s in shapes.items() if ".transformer_blocks." in n}
        stems = {f"lora_unet_{sgm(n).replace('.', '_')}": s for n, s in shapes.items()}
    else:
        modules = {bfl: parts for bfl, parts in bfl_modules(shapes).items() if "blocks" in bfl}
        rows = {bfl: (sum(shapes[n][0] for n in parts), shapes[parts[0]][1]) for bfl, parts in modules.items()}
        stems = {f"lora_unet_{bfl.replace('.', '_')}": shape for bfl, shape in rows.items()}
    layers = tiny.random_lora(stems, 4, seed=1, alpha=2.0)
    tensors = {key: x for stem, factors in layers.items() for key, x in keyed(stem, factors, KOHYA).items()}
    tensors |= {f"{stem}.alpha": torch.tensor(2.0) for stem in layers}
    for number, component in enumerate(encoders, start=1):
        tensors |= kohya_encoder(number, model.text_encoders[component])
    return tensors


@pytest.mark.parametrize("file", [diffusers_file, kohya_file], ids=["diffusers", "kohya"])
def test_image_is_the_one_that_diffusers_makes_with_the_file(
    model: Family, path: Path, file: Callable[[Family, list[str]], dict[str, Tensor]]
) -> None:
    """One level of 255: the merged weight and peft's two products round differently; the LoRA moves tens of levels."""
    loaded = {StableDiffusionXLPipeline: ["text_encoder", "text_encoder_2"], FluxPipeline: ["text_encoder"]}
    lora = read(model, path, file(model, loaded[type(model.pipe)]))
    assert list(lora.text_encoders) == loaded[type(model.pipe)]
    seen, plain, without_encoders = (picture(model, each) for each in (lora, LoRA({}), LoRA(lora.layers)))
    pipeline = type(model.pipe).from_pretrained(model.pipe.config._name_or_path)
    meant = diffusers_picture(pipeline, path, model.guidance_scale)
    assert np.abs(seen - meant).max() <= 1
    assert np.abs(seen - plain).mean() > 5
    assert np.abs(seen - without_encoders).mean() > 1
