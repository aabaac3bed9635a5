"""PEFT's own folders of LoHa and LoKr mean what PEFT makes of them, and a folder what its files mean by themselves."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from klora.errors import LoRAError
from klora.models.family import Family
from test_folder.files.reading import GOOD, Q, assert_same_delta, pair, read
from test_folder.files.spelling import keyed

LAYERS = ("to_q", "to_k", "to_out.0")
CONFIGS = [
    peft.LoHaConfig(r=4, alpha=8, target_modules=LAYERS, init_weights=False),
    peft.LoKrConfig(r=4, alpha=8, target_modules=LAYERS, init_weights=False),
    peft.LoKrConfig(r=64, alpha=8, target_modules=LAYERS, init_weights=False),  # so wide that both factors are whole
    peft.LoHaConfig(r=4, alpha=8, target_modules=LAYERS, init_weights=False, rank_pattern={"attn1.to_q": 2},
                    alpha_pattern={"attn1.to_k": 3}),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=["LoHa", "LoKr", "whole LoKr", "patterns"])
def test_a_peft_folder_of_another_kind_has_pefts_scale(sdxl: Family, tmp_path: Path, config: peft.PeftConfig) -> None:
    unet = type(sdxl.denoiser).from_config(sdxl.denoiser.config)
    adapted = peft.get_peft_model(unet, config)
    adapted.save_pretrained(tmp_path)
    lora = sdxl.read_lora(tmp_path)
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    assert lora.keys() == layers.keys()
    for name, layer in layers.items():
        assert_same_delta(lora[name], layer.get_delta_weight("default").detach().double())


def config_of(**said: Any) -> str:
    return json.dumps({"r": 2, "lora_alpha": 8} | said)


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ({"peft_type": "VERA"}, "is PEFT's VERA. Expected LORA, LOHA, LOKR."),
        ({"alpha_pattern": {"a|b": 2}}, "has 'a|b' in its alpha_pattern. Expected names of layers"),
        ({"peft_type": "LOHA", "alpha": 4, "r": 0}, "(r 0). Expected numbers for alpha and rank."),
        ({"lora_alpha": "x"}, "Expected numbers for alpha and rank."),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ],
)
def test_what_no_pair_means_is_refused(sdxl: Family, tmp_path: Path, said: dict[str, Any], seen: str) -> None:
    save_file(keyed(f"base_model.model.{Q}", pair(32, 32)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config_of(**said))
    with pytest.raises(LoRAError) as error:
        sdxl.read_lora(tmp_path)
    assert seen in str(error.value)


def test_only_pefts_own_file_has_its_alpha_beside_it(sdxl: Family, tmp_path: Path) -> None:
    """As on the hub, where nobody fetches a config for another file."""
    alone = read(sdxl, tmp_path / "pytorch_lora_weights.safetensors", GOOD)
    (tmp_path / "adapter_config.json").write_text(config_of())
    assert torch.equal(sdxl.read_lora(tmp_path)[Q].B, alone[Q].B)


def test_a_difference_is_read_alike_every_time_and_leaves_chance_alone(sdxl: Family, tmp_path: Path) -> None:
    weights = {f"lora_unet_{Q.replace('.', '_')}.diff": nn.Linear(32, 32).weight.detach()}
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        seen.append(read(sdxl, tmp_path / "lora.safetensors", weights)[Q])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seen[0].A, seen[1].A) and torch.equal(seen[0].B, seen[1].B)


HUGE = {
    "LoKr": {"lokr_w1_a": (3000, 32), "lokr_w1_b": (32, 3000), "lokr_w2_a": (3000, 32), "lokr_w2_b": (32, 3000)},
    "LoHa": {"hada_w1_a": (200_000, 22), "hada_w1_b": (22, 32), "hada_w2_a": (200_000, 22), "hada_w2_b": (22, 32)},
}


@pytest.mark.parametrize("kind", HUGE)
def test_layers_larger_than_the_bases_are_refused_before_they_are_made(sdxl: Family, tmp_path: Path, kind: str) -> None:
    """769 KB of LoKr stood for 9 million by 9 million weights, of which 512 ranks take 37 GB."""
    stem = f"lora_unet_{Q.replace('.', '_')}"
    tensors = {f"{stem}.{name}": torch.ones(shape, dtype=torch.float16) for name, shape in HUGE[kind].items()}
    with pytest.raises(LoRAError, match=rf"was made for another base: '{stem}' is \(\d+00000, .*Expected \(32, 32\)"):
        read(sdxl, tmp_path / "lora.safetensors", tensors)


def test_a_trigger_that_can_stand_in_no_prompt_is_none(sdxl: Family, tmp_path: Path) -> None:
    for trigger in ("\x1b[2Jsks\nERROR", "x" * 300):
        save_file(GOOD, tmp_path / "lora.safetensors", {"trigger": trigger, "ss_trigger": "sks"})
        lora = sdxl.read_lora(tmp_path / "lora.safetensors")
        assert lora.metadata["trigger"] == "sks" and lora.report.triggers == ("sks",)
        assert str(lora.report).isprintable()


@pytest.mark.parametrize("encoder", ["text_encoders.clip_l.transformer.", "lora_te1_"])
def test_comfyuis_names_of_text_encoders_are_known(sdxl: Family, tmp_path: Path, encoder: str) -> None:
    stem = f"{encoder}text_model.encoder.layers.0.self_attn.q_proj".replace(".", "_" if "_te" in encoder else ".")
    lora = read(sdxl, tmp_path / "lora.safetensors", GOOD | keyed(stem, pair(32, 32)))
    assert len(lora.text_encoders["text_encoder"]) == 1
