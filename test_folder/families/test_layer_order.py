"""The denoiser's layers: each is alive, and they come in the order in which they run."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from klora.layers import attached
from klora.lora import LowRank, Plan
from klora.models import load_shapes
from klora.models.family import Family
from klora.models.linears import execution_order
from klora.models.sdxl import _smallest_call
from test_folder import tiny
from test_folder.families.painting import paint


def called_linears(model: Family) -> list[str]:
    """Names of the linear layers in the order of their first call while an image is made."""
    called: dict[str, None] = {}
    hooks = [
        model.denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: called.setdefault(n))
        for name in tiny.linear_shapes(model.denoiser)
    ]
    paint(model, num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    return list(called)


def test_lora_layers_come_in_the_order_of_their_first_call(model: Family, tmp_path: Path) -> None:
    shapes = tiny.linear_shapes(model.denoiser)
    order = called_linears(model)
    layers = tiny.random_lora(dict(reversed(shapes.items())), 1, seed=0)
    path = tiny.save_lora(tmp_path / "lora.safetensors", layers, prefix=model.component)
    assert set(order) == set(shapes)
    assert list(model.read_lora(path)) == order
    assert order != list(shapes)


def test_bases_of_one_architecture_share_an_order_that_is_found_once(bases: Path) -> None:
    """Where their folders lie and how their weights are stored is not part of it."""
    sdxl, other = (load_shapes("sdxl", bases / base).denoiser for base in ("sdxl", "illustrious-xl"))
    assert execution_order(other, tiny.unet_inputs) is execution_order(sdxl, tiny.unet_inputs)
    deeper = tiny.full_topology_unet()
    order = execution_order(deeper, tiny.unet_inputs)
    assert order.keys() > execution_order(sdxl, tiny.unet_inputs).keys()
    deeper.register_to_config(_name_or_path="elsewhere", quantization_config=object())
    assert execution_order(deeper, tiny.unet_inputs) is order


def test_unet_goes_down_then_through_the_middle_then_up(sdxl: Family, tmp_path: Path) -> None:
    layers = tiny.random_lora(tiny.linear_shapes(sdxl.denoiser), 1, seed=0)
    names = list(sdxl.read_lora(tiny.save_lora(tmp_path / "lora.safetensors", layers)))
    stages = [name.split("_")[0] for name in names if "_block" in name.split(".")[0]]
    assert [a for a, b in pairwise([*stages, ""]) if a != b] == ["down", "mid", "up"]


@pytest.mark.parametrize("engine", ["gated", "merged"])
def test_every_linear_of_the_denoiser_is_alive(model: Family, engine: str) -> None:
    """One LoRA on one layer at a time: 1e-4 is a hundred times the rounding of a float32 forward call."""
    unet = model.component == "unet"
    inputs = (tiny.unet_inputs if unet else tiny.flux_inputs)(model.denoiser)
    with torch.no_grad():
        before = model.denoiser(**inputs).sample
        for name, shape in tiny.linear_shapes(model.denoiser).items():
            A, B = tiny.random_lora({name: shape}, 4, seed=0, std=1.0)[name]
            with attached(model.denoiser, Plan.constant(({name: LowRank(A, B)},), (1.0,)), engine=engine):
                change = (model.denoiser(**inputs).sample - before).abs().max()
            assert change > 1e-4, name
        assert torch.equal(model.denoiser(**inputs).sample, before)


def test_flux_lora_may_adapt_the_layers_that_the_published_code_forgets(models: dict[str, Family]) -> None:
    """HVision-NKU/K-LoRA#17: written with setattr(linear, "", new), they never ran."""
    shapes = tiny.linear_shapes(models["flux-dev"].denoiser)
    forgotten = ("attn.to_out.0", "ff.net.2", "ff_context.net.2", "norm1_context.linear")
    assert {f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in forgotten} <= shapes.keys()


def test_a_compiled_denoisers_layers_are_those_of_what_was_compiled(sdxl: Family) -> None:
    compiled = torch.compile(sdxl.denoiser, backend="eager")
    assert execution_order(compiled, _smallest_call) == sdxl.inventory["unet"]
