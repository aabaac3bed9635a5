"""What klora writes reads back bit for bit, for our reader and for diffusers' own."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from klora.lora import LoRA, LowRank, save_lora
from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import assert_same_bits, delta, pair
from test_folder.files.spelling import attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_file_reads_back_bit_for_bit(model: Family, path: Path, dtype: torch.dtype) -> None:
    parts = {model.component: model.denoiser, **model.text_encoders}
    drawn = {c: tiny.random_lora(tiny.linear_shapes(part), 3, seed=i) for i, (c, part) in enumerate(parts.items())}
    meant = {c: {n: (A.to(dtype), B.to(dtype)) for n, (A, B) in layers.items()} for c, layers in drawn.items()}
    layers, *encoders = ({n: LowRank(*factors) for n, factors in part.items()} for part in meant.values())
    metadata = {"trigger": "sks dog", "note": "Grüße ☃"}
    save_lora(path, LoRA(layers, dict(zip(model.text_encoders, encoders, strict=True)), metadata), model.component)
    seen = model.read_lora(path)
    assert_same_bits(seen, meant.pop(model.component))
    assert seen.text_encoders.keys() == meant.keys()
    for component, part in meant.items():
        assert_same_bits(seen.text_encoders[component], part)
    assert seen.metadata == metadata


def test_file_is_saved_in_the_dtype_asked_for(path: Path) -> None:
    A, B = pair(4, 5)
    save_lora(path, LoRA({"x": LowRank(A, B)}), "unet", torch.float16)
    assert {key: tensor.dtype for key, tensor in load_file(path).items()} == dict.fromkeys(load_file(path), torch.half)
    assert load_file(path).keys() == {"unet.x.lora_A.weight", "unet.x.lora_B.weight"}


def test_a_file_is_as_open_as_any_other_new_one(path: Path) -> None:
    usual = os.umask(0o027)
    try:
        path.with_name("other").touch()
        save_lora(path, LoRA({"x": LowRank(*pair(4, 5))}), "unet")
    finally:
        assert os.umask(usual) == 0o027
    assert path.stat().st_mode == path.with_name("other").stat().st_mode


def test_stock_diffusers_reads_what_klora_saves(model: Family, bases: Path, path: Path) -> None:
    layers = tiny.random_lora(attention(model), 2, seed=0)
    encoder = model.text_encoders["text_encoder"]
    texts = tiny.random_lora(tiny.linear_shapes(encoder), 2, seed=1)
    pairs = [{name: LowRank(*factors) for name, factors in part.items()} for part in (layers, texts)]
    save_lora(path, LoRA(pairs[0], {"text_encoder": pairs[1]}), model.component)
    pipeline = type(model.pipe).from_pretrained(model.pipe.config._name_or_path)
    pipeline.load_lora_weights(path, adapter_name="x")
    for component, part in ((model.component, layers), ("text_encoder", texts)):
        for name, factors in part.items():
            seen = getattr(pipeline, component).get_submodule(name).get_delta_weight("x")
            torch.testing.assert_close(seen.double(), delta(factors), rtol=1e-5, atol=1e-6)


def test_layers_that_share_a_factor_are_saved_and_a_path_may_be_text(tmp_path: Path) -> None:
    """As q, k and v do, which kohya's files for FLUX hold as one."""
    A = torch.randn(2, 5)
    layers = {name: LowRank(A, torch.randn(4, 2)) for name in ("to_q", "to_k")}
    path = save_lora(str(tmp_path / "saved.safetensors"), LoRA(layers), "unet")
    assert torch.equal(load_file(path)["unet.to_q.lora_A.weight"], A)
    assert torch.equal(load_file(path)["unet.to_k.lora_A.weight"], A)
