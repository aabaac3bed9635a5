"""Alpha in a file's header, as diffusers writes it, is folded as PEFT does, or refused in a sentence."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError
from klora.lora import save_lora
from klora.models.family import Family
from test_folder.files.reading import (
    GOOD,
    KOHYA_Q,
    K,
    Q,
    assert_is_a_sentence,
    assert_same_bits,
    assert_same_delta,
    delta,
    pair,
)
from test_folder.files.spelling import Layers, keyed, spelled
from test_folder.waiting import at_most


def with_metadata(path: Path, tensors: Mapping[str, Tensor], **fields: object) -> None:
    defaults = {"r": 4, "lora_alpha": 2.0, "target_modules": [Q, K]}
    packed = {f"unet.{name}": value for name, value in (defaults | fields).items()}
    save_file(dict(tensors), path, metadata={"lora_adapter_metadata": json.dumps(packed), "note": "kept"})


def two_layers() -> Layers:
    return {Q: pair(32, 32, rank=4, seed=0), K: pair(32, 32, rank=4, seed=1)}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="one alpha"),
        pytest.param({"alpha_pattern": {"attn1.to_q": 8.0}}, id="end of the name"),
        pytest.param({"alpha_pattern": {"1.to_q": 8.0}}, id="letters that end the name"),
        pytest.param({"alpha_pattern": {Q: 8.0}}, id="whole name"),
        pytest.param({"alpha_pattern": {f"^{Q}": 8.0}}, id="anchored name"),
        pytest.param({"alpha_pattern": {"^attn1.to_q": 8.0}}, id="anchored end"),
        pytest.param({"use_rslora": True}, id="rslora"),
    ],
)
def test_alpha_in_the_header_is_folded_as_peft_does(sdxl: Family, path: Path, fields: dict[str, object]) -> None:
    with_metadata(path, spelled(two_layers(), "unet", "diffusers"), **fields)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl.pipe.config._name_or_path)
    pipeline.load_lora_weights(path, adapter_name="x")
    seen = sdxl.read_lora(path)
    for name in (Q, K):
        assert_same_delta(seen[name], pipeline.unet.get_submodule(name).get_delta_weight("x").double())


def test_alpha_of_a_text_encoder_in_the_header_is_folded_too(sdxl: Family, path: Path) -> None:
    factors = pair(32, 32, rank=4)
    tensors = GOOD | keyed("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", factors)
    save_file(tensors, path, metadata={"lora_adapter_metadata": '{"text_encoder_2.lora_alpha": 2.0}'})
    seen = sdxl.read_lora(path)
    (layer,) = seen.text_encoders["text_encoder_2"].values()
    assert_same_delta(layer, delta(factors, 2.0))
    assert_same_delta(seen[Q], delta(pair(32, 32)))


def test_mixed_ranks_each_divide_the_headers_alpha(sdxl: Family, path: Path) -> None:
    layers = {Q: pair(32, 32, rank=2), K: pair(32, 32, rank=4)}
    with_metadata(path, spelled(layers, "unet", "diffusers"), rank_pattern={Q: 2})
    seen = sdxl.read_lora(path)
    for name, factors in layers.items():
        assert_same_delta(seen[name], delta(factors, 2.0))


def test_folded_alpha_is_not_folded_again_after_saving(sdxl: Family, path: Path) -> None:
    with_metadata(path, spelled(two_layers(), "unet", "diffusers"))
    first = sdxl.read_lora(path)
    second = sdxl.read_lora(save_lora(path.with_name("again.safetensors"), first, "unet"))
    assert_same_bits(second, {name: (layer.A, layer.B) for name, layer in first.items()})
    assert second.metadata["note"] == "kept"


def test_alpha_in_both_tensor_and_header_is_refused(sdxl: Family, path: Path) -> None:
    with_metadata(path, spelled(two_layers(), "unet", "kohya") | {f"{KOHYA_Q}.alpha": torch.tensor(2.0)})
    with pytest.raises(LoRAError) as refusal:
        sdxl.read_lora(path)
    assert_is_a_sentence(str(refusal.value), path, "alpha")


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "null",
        "3",
        '{"unet.lora_alpha": "two"}',
        '{"unet.lora_alpha": [2]}',
        '{"unet.lora_alpha": -1}',
        '{"unet.lora_alpha": 0}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": Infinity}',
        '{"unet.lora_alpha": 2, "unet.alpha_pattern": ["to_q"]}',
        pytest.param('{"unet.lora_alpha": 1' + "0" * 400 + "}", id="1e400"),
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep list"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="deep object"),
    ],
)
def test_header_that_makes_no_sense_is_refused_in_a_sentence(sdxl: Family, path: Path, header: str) -> None:
    save_file(GOOD, path, metadata={"lora_adapter_metadata": header})
    with at_most(seconds=5), pytest.raises(LoRAError) as refusal:
        sdxl.read_lora(path)
    assert_is_a_sentence(str(refusal.value), path, "alpha")


@pytest.mark.parametrize("pattern", [r"attn1\.to_(q|v)", "(((a|_|[a-z0-9.])+)+)+!"])
def test_expression_in_the_header_is_refused_and_never_run(sdxl: Family, path: Path, pattern: str) -> None:
    """peft would run it: the second takes it longer than anyone waits."""
    with_metadata(path, spelled(two_layers(), "unet", "diffusers"), alpha_pattern={pattern: 8.0})
    with at_most(seconds=5), pytest.raises(LoRAError) as refusal:
        sdxl.read_lora(path)
    assert_is_a_sentence(str(refusal.value), path, "alpha_pattern")
