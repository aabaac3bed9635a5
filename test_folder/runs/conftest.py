"""A base of each family, a content and a style LoRA of it, and the engine that has to run them."""

import dataclasses
from functools import cache

import pytest
import torch

from klora import layers as klora_layers
from klora.models import FAMILIES
from test_folder.runs.drawing import ENGINES, random_lora
from test_folder.tiny import BASES


@pytest.fixture(scope="module", params=BASES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def load(bases):
    return lambda family: FAMILIES[family].load(bases / BASES[family], torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def load_once(load):
    return cache(load)


@pytest.fixture(scope="module")
def model(load_once, family):
    """The same for all tests, which therefore notice what one of them leaves behind."""
    return load_once(family)


@pytest.fixture(scope="module")
def files(loras, family):
    return {role: loras / f"{family}_{role}.safetensors" for role in ("content", "style")}


@pytest.fixture(scope="module")
def both(model, files):
    """Content and style, for the denoiser and for the text encoders."""
    encoders = [
        {component: random_lora(encoder, 2, seed) for component, encoder in model.text_encoders.items()}
        for seed in range(2)
    ]
    return {
        role: dataclasses.replace(model.read_lora(path), text_encoders=layers)
        for (role, path), layers in zip(files.items(), encoders, strict=True)
    }


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setattr(klora_layers, "free_bytes", lambda device: ENGINES[request.param])
    return request.param
