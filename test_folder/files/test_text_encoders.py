"""Layers of text encoders are found under every name that files give them."""

from pathlib import Path

import pytest

from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import assert_same_bits, denoiser_layer, pair, read
from test_folder.files.spelling import KOHYA, LEGACY, PEFT, Endings, keyed


@pytest.mark.parametrize(
    ("family", "stem", "component", "module"),
    [
        ("sdxl", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 1, "encoder.layers.0.self_attn.q_proj"),
        ("sdxl", "lora_te_text_model_encoder_layers_1_mlp_fc1", 1, "encoder.layers.1.mlp.fc1"),
        ("sdxl", "lora_te_text_model_encoder_layers_1_self_attn_q_proj", 1, "encoder.layers.1.self_attn.q_proj"),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_self_attn_out_proj", 2, "encoder.layers.0.self_attn.out_proj"),
        ("sdxl", "lora_te2_text_projection", 2, "text_projection"),
        ("sdxl", "text_encoder.text_model.encoder.layers.0.self_attn.v_proj", 1, "encoder.layers.0.self_attn.v_proj"),
        ("sdxl", "text_encoder.encoder.layers.0.self_attn.v_proj", 1, "encoder.layers.0.self_attn.v_proj"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.1.mlp.fc2", 2, "encoder.layers.1.mlp.fc2"),
        ("flux", "lora_te1_text_model_encoder_layers_0_self_attn_k_proj", 1, "encoder.layers.0.self_attn.k_proj"),
        ("flux", "text_encoder.text_model.encoder.layers.1.mlp.fc2", 1, "encoder.layers.1.mlp.fc2"),
        ("flux", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", 2, "encoder.block.0.layer.0.SelfAttention.q"),
        (
            "flux",
            "text_encoder_2.encoder.block.1.layer.0.SelfAttention.o",
            2,
            "encoder.block.1.layer.0.SelfAttention.o",
        ),
        ("flux", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", 2, "encoder.block.0.layer.0.SelfAttention.q"),
    ],
)
@pytest.mark.parametrize("endings", [PEFT, KOHYA, LEGACY], ids=["peft", "kohya", "legacy"])
def test_text_encoder_layer_is_found(
    families: dict[str, Family], path: Path, family: str, stem: str, component: int, module: str, endings: Endings
) -> None:
    model = families[family]
    part = ("", "text_encoder", "text_encoder_2")[component]
    shapes = tiny.linear_shapes(model.text_encoders[part])
    (name,) = {module, f"text_model.{module}"} & shapes.keys()
    factors = pair(*shapes[name])
    seen = read(model, path, keyed(stem, factors, endings) | denoiser_layer(family))
    assert seen.text_encoders.keys() == {part}
    assert_same_bits(seen.text_encoders[part], {name: factors})
