"""The published models' layers are as many as published, run in that order, and each has a gate that acts."""

import re
from functools import cache

import pytest
import torch

from klora.layers import LoRALinear, attached
from klora.lora import Plan
from klora.models.linears import execution_order
from test_folder import published, tiny
from test_folder.layers.network import random_lora

UNET_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
FLUX_ATTENTION = r"\.attn\.to_(q|k|v|out\.0)$"
FLUX_BLOCKS = r"^(single_)?transformer_blocks\."
UNET = (published.unet, tiny.full_topology_unet, tiny.unet_inputs)
FLUX = (published.flux, tiny.full_topology_flux, tiny.flux_inputs)


@cache
def linears_in_execution_order(build, inputs):
    with torch.device("meta"):
        model = build()
    return list(execution_order(model, inputs))


@pytest.mark.parametrize(
    ("real", "narrow", "inputs", "pattern", "count"),
    [(*UNET, UNET_ATTENTION, 560), (*FLUX, FLUX_ATTENTION, 190), (*FLUX, FLUX_BLOCKS, 494)],
)
def test_published_model_has_as_many_layers_as_published_and_the_narrow_one_the_same(
    real, narrow, inputs, pattern, count
):
    names = linears_in_execution_order(real, inputs)
    assert len([name for name in names if re.search(pattern, name)]) == count
    assert linears_in_execution_order(narrow, inputs) == names


def test_published_unet_runs_its_attention_down_then_mid_then_up():
    names = linears_in_execution_order(published.unet, tiny.unet_inputs)
    sections = [name.partition("_")[0] for name in names if re.search(UNET_ATTENTION, name)]
    assert sections == ["down"] * 192 + ["mid"] * 80 + ["up"] * 288


@pytest.mark.parametrize(
    ("build", "inputs", "pattern", "count"),
    [(*UNET[1:], UNET_ATTENTION, 560), (*FLUX[1:], FLUX_BLOCKS, 494)],
    ids=["sdxl", "flux"],
)
def test_output_depends_on_every_row_that_a_gate_is_written_into(build, inputs, pattern, count):
    model = build()
    names = [name for name in linears_in_execution_order(build, inputs) if re.search(pattern, name)]
    plan = Plan.constant((random_lora(model, names, 2, seed=1), random_lora(model, names, 1, seed=2)), (1.0, 0.5))
    with attached(model, plan, engine="gated"), torch.enable_grad():
        wrapped = {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}
        for part in wrapped.values():
            part.lora_A = part.lora_A.clone().requires_grad_()
        model(**inputs(model)).sample.square().sum().backward()
        dead = [name for name, part in wrapped.items() if not moves_the_output(part.lora_A)]
    assert len(wrapped) == count
    assert dead == []


def moves_the_output(lora_A):
    return lora_A.grad is not None and bool(lora_A.grad.any(dim=1).all())
