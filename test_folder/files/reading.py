"""Small LoRA files, read, and what must come of it: the same bits, the same update, or one sentence."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from klora.lora import LoRA, LowRank
from klora.models.family import Family
from test_folder.files.spelling import Layers, keyed

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 x 32
KOHYA_Q = f"lora_unet_{Q.replace('.', '_')}"
K = Q.replace("to_q", "to_k")
FLUX_Q = "transformer_blocks.0.attn.to_q"  # 64 x 64
CLIP_Q = "text_model_encoder_layers_0_self_attn_q_proj"  # 32 x 32


def pair(outputs: int, inputs: int, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


GOOD = keyed(f"unet.{Q}", pair(32, 32))
GOOD_FLUX = keyed(f"transformer.{FLUX_Q}", pair(64, 64))


def denoiser_layer(family: str) -> dict[str, Tensor]:
    stem, size = {"sdxl": (f"unet.{Q}", 32), "flux": (f"transformer.{FLUX_Q}", 64)}[family]
    return keyed(stem, pair(size, size))


def read(model: Family, path: Path, tensors: Mapping[str, Tensor]) -> LoRA:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return model.read_lora(path)


def delta(factors: tuple[Tensor, Tensor], alpha: float | None = None) -> Tensor:
    """What a file means by one layer: alpha / rank * B A, in float64; without alpha B A."""
    A, B = (factor.double() for factor in factors)
    return B @ A * (1.0 if alpha is None else alpha / len(A))


def assert_same_bits(seen: Mapping[str, LowRank], meant: Layers) -> None:
    assert seen.keys() == meant.keys()
    for name, (A, B) in meant.items():
        assert torch.equal(seen[name].A, A) and torch.equal(seen[name].B, B), name
        assert (seen[name].A.dtype, seen[name].B.dtype) == (A.dtype, B.dtype), name


def assert_same_delta(seen: LowRank, meant: Tensor) -> None:
    """rtol: klora rounds alpha/rank * B to float32 once; products are compared in float64."""
    torch.testing.assert_close(seen.B.double() @ seen.A.double(), meant, rtol=1e-5, atol=1e-6)


def assert_is_a_sentence(message: str, path: Path, seen: str) -> None:
    """What was wrong with which file, what was seen, what is accepted; on one line, without the file's folder."""
    assert message.startswith(path.name) and message.endswith(".") and "\n" not in message
    assert seen in message and "Expected" in message, message
