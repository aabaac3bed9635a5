"""What cannot be applied exactly, or is no LoRA file at all, is refused in a sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError
from klora.files.container import Spec
from klora.files.factors import modules
from klora.files.lycoris import MAX_DENSE
from klora.models import origin_of
from klora.models.family import Family
from test_folder.files.reading import CLIP_Q, FLUX_Q, GOOD, GOOD_FLUX, KOHYA_Q, Q, assert_is_a_sentence, pair, read
from test_folder.files.spelling import KOHYA, XLABS, keyed
from test_folder.waiting import at_most

BLOCK_7 = "lora_unet_down_blocks_7_attentions_0_proj_in"
SGM = "lora_unet_input_blocks_3_1"  # down_blocks.1.attentions.0 of the tiny U-Net
BFL_PROJ = "lora_unet_double_blocks_0_img_attn_proj"
POSITIONS = "lora_te1_text_model_embeddings_position_embedding"


def with_alpha(alpha: float | list[float]) -> dict[str, Tensor]:
    return keyed(KOHYA_Q, pair(32, 32), KOHYA) | {f"{KOHYA_Q}.alpha": torch.tensor(alpha)}


def with_value(value: float, part: int) -> dict[str, Tensor]:
    factors = pair(32, 32)
    factors[part][1, 1] = value
    return keyed(f"unet.{Q}", factors)


def kohya_layer(stem: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    return keyed(stem, pair(outputs, inputs), KOHYA)


CONV = keyed("unet.conv_in", (torch.ones(2, 4, 3, 3), torch.ones(16, 2, 1, 1)))

REFUSED = {  # what the file holds: (family of the base, tensors, what the sentence names)
    "DoRA": ("sdxl", GOOD | {f"unet.{Q}.dora_scale": torch.ones(32)}, "DoRA"),
    "DoRA of peft": ("sdxl", GOOD | {f"unet.{Q}.lora_magnitude_vector.weight": torch.ones(32)}, "DoRA"),
    "part of a LoHa": ("sdxl", {f"{KOHYA_Q}.hada_w1_a": torch.ones(32, 2)}, f"only hada_w1_a for '{KOHYA_Q}'"),
    "part of a LoKr": ("sdxl", {f"{KOHYA_Q}.lokr_w1": torch.ones(4, 4)}, f"only lokr_w1 for '{KOHYA_Q}'"),
    "Tucker": ("sdxl", GOOD | {f"{KOHYA_Q}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker"),
    "LoKr of a convolution": ("sdxl", GOOD | {f"{KOHYA_Q}.lokr_t2": torch.ones(2, 2, 3, 3)}, "Tucker"),
    "OFT": ("sdxl", {f"{KOHYA_Q}.oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
    "difference twice": ("sdxl", GOOD | {f"{KOHYA_Q}.diff": torch.ones(32, 32)}, f"'{Q}' twice"),
    "difference beside factors": (
        *("sdxl", kohya_layer(KOHYA_Q, 32, 32) | {f"{KOHYA_Q}.diff": torch.ones(32, 32)}),
        f"only lora_A and lora_B and diff for '{KOHYA_Q}'",
    ),
    "difference of a bias": ("sdxl", GOOD | {f"{KOHYA_Q}.diff_b": torch.ones(32)}, "a bias difference"),
    "difference of a norm": ("sdxl", GOOD | {f"{KOHYA_Q}.w_norm": torch.ones(32)}, "norm difference"),
    "trained bias": ("sdxl", GOOD | {f"unet.{Q}.lora_B.bias": torch.ones(32)}, f"'unet.{Q}.lora_B.bias'"),
    "embedding of another width": ("sdxl", GOOD | {"bundle_emb.sks.clip_l": torch.ones(1, 768)}, "[1, 768]"),
    "embedding of another encoder": (
        "sdxl",
        GOOD | {"bundle_emb.sks.llama": torch.ones(1, 32)},
        "unknown text encoder",
    ),
    "checkpoint": ("sdxl", {"conv_in.weight": torch.ones(16, 4, 3, 3)}, "'conv_in.weight', which is no LoRA factor"),
    "convolution": ("sdxl", GOOD | CONV, "convolution 'unet.conv_in'"),
    "orphan alpha": ("sdxl", GOOD | {f"{KOHYA_Q}.alpha": torch.tensor(1.0)}, f"alpha but no factors for '{KOHYA_Q}'"),
    "A alone": ("sdxl", {f"unet.{Q}.lora_A.weight": torch.ones(2, 32)}, f"only lora_A for 'unet.{Q}'"),
    "B alone": ("flux", {f"transformer.{FLUX_Q}.lora_B.weight": torch.ones(64, 2)}, "only lora_B"),
    "alpha 0": ("sdxl", with_alpha(0.0), "alpha 0.0"),
    "alpha -1": ("sdxl", with_alpha(-1.0), "alpha -1.0"),
    "alpha nan": ("sdxl", with_alpha(float("nan")), "alpha nan"),
    "alpha inf": ("sdxl", with_alpha(float("inf")), "alpha inf"),
    "alpha 1e9": ("sdxl", with_alpha(1e9), "alpha 1000000000.0"),
    "alpha vector": ("sdxl", with_alpha([1.0, 1.0]), "alpha"),
    "ranks differ": ("sdxl", keyed(Q, (torch.ones(2, 32), torch.ones(32, 3))), "2 and 3"),
    "rank 0": ("sdxl", keyed(Q, (torch.ones(0, 32), torch.ones(32, 0))), "0"),
    "wider output": ("sdxl", keyed(f"unet.{Q}", pair(64, 32)), "(64, 32)"),
    "wider input": ("sdxl", keyed(f"unet.{Q}", pair(32, 64)), "(32, 64)"),
    "wider under sgm names": ("sdxl", kohya_layer(f"{SGM}_proj_in", 64, 64), "(64, 64)"),
    "wider, the second of two": (
        *("sdxl", kohya_layer(f"{SGM}_proj_in", 32, 32) | kohya_layer(f"{SGM}_proj_out", 64, 64)),
        f"'{SGM}_proj_out' is (64, 64)",
    ),
    "wider text encoder": ("sdxl", GOOD | kohya_layer(f"lora_te1_{CLIP_Q}", 64, 64), "(64, 64)"),
    "nan in A": ("sdxl", with_value(float("nan"), 0), f"{Q}' that are not finite"),
    "inf in B": ("sdxl", with_value(float("inf"), 1), f"{Q}' that are not finite"),
    "FLUX to SDXL": ("sdxl", GOOD_FLUX, f"'transformer.{FLUX_Q}', which is no linear layer of this base"),
    "FLUX of kohya to SDXL": (
        "sdxl",
        kohya_layer(BFL_PROJ, 64, 64),
        f"'{BFL_PROJ}', which is no linear layer of this base",
    ),
    "SDXL of kohya to FLUX": (
        "flux",
        kohya_layer(KOHYA_Q, 32, 32),
        f"'{KOHYA_Q}', which is no linear layer of this base",
    ),
    "one layer twice": ("sdxl", GOOD | kohya_layer(KOHYA_Q, 32, 32), f"'{Q}' twice"),
    "some unknown to SDXL": ("sdxl", GOOD | keyed("mystery", pair(32, 32)), "'mystery', which is no linear layer"),
    "block that SDXL lacks": ("sdxl", GOOD | kohya_layer(BLOCK_7, 32, 32), f"'{BLOCK_7}', which is no linear layer"),
    "block that FLUX lacks": ("flux", kohya_layer(BFL_PROJ.replace("0", "30"), 64, 64), "double_blocks_30"),
    "SDXL to FLUX": ("flux", GOOD, f"'unet.{Q}', which is no linear layer of this base"),
    "some unknown to FLUX": ("flux", GOOD_FLUX | keyed("mystery", pair(32, 32)), "'mystery', which is no linear layer"),
    "XLabs' block that FLUX lacks": (
        *("flux", keyed("double_blocks.30.processor.qkv_lora1", pair(192, 64), XLABS)),
        "double_blocks.30",
    ),
    "XLabs' block twice, of which diffusers' converter drops one": (
        "flux",
        keyed("single_blocks.0.processor.qkv_lora", pair(192, 64), XLABS)
        | keyed("single_blocks.0.processor.qkv_lora1", pair(192, 64), XLABS),
        "'single_blocks.0.processor.qkv",
    ),
    "position embedding": ("flux", kohya_layer(BFL_PROJ, 64, 64) | kohya_layer(POSITIONS, 77, 32), f"'{POSITIONS}'"),
    "nothing for SDXL": ("sdxl", {}, "no tensors"),
    "nothing for FLUX": ("flux", {}, "no tensors"),
    "complex": ("sdxl", {k: x.to(torch.complex64) for k, x in GOOD.items()}, "C64"),
    "two adapters": (
        "sdxl",
        GOOD | keyed(f"unet.{Q}", pair(32, 32), (".lora_A.b.weight", ".lora_B.b.weight")),
        "twice",
    ),
    "one layer twice, once by its sgm name": (
        *("sdxl", GOOD | kohya_layer(f"{SGM}_transformer_blocks_0_attn1_to_q", 32, 32)),
        f"'{Q}' twice",
    ),
    "checkpoint of Stability": (
        *("sdxl", {"model.diffusion_model.out.2.weight": torch.ones(4, 16, 3, 3)}),
        "'model.diffusion_model.out.2.weight', which is no LoRA factor",
    ),
    "int8": ("sdxl", {k: x.to(torch.int8) for k, x in GOOD.items()}, "I8 values"),
    "BFL's name twice": (
        *("flux", kohya_layer(BFL_PROJ, 64, 64) | keyed("double_blocks.0.img_attn.proj", pair(64, 64))),
        "twice",
    ),
    "some unknown to FLUX, beside BFL's": (
        *("flux", kohya_layer(BFL_PROJ, 64, 64) | keyed("mystery", pair(32, 32))),
        "'mystery'",
    ),
}

CASES = [pytest.param(*case, id=name) for name, case in REFUSED.items()]


@pytest.mark.parametrize(("family", "tensors", "seen"), CASES)
def test_what_cannot_be_applied_exactly_is_refused_in_a_sentence(
    families: dict[str, Family], path: Path, family: str, tensors: dict[str, Tensor], seen: str
) -> None:
    with at_most(seconds=5), pytest.raises(LoRAError) as refusal:
        read(families[family], path, tensors)
    assert_is_a_sentence(str(refusal.value), path, seen)


def loha(rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of one that stands for MAX_DENSE weights."""
    factors = {"a": (MAX_DENSE >> 13, rank), "b": (rank, 1 << 13)}
    return {f"hada_{name}_{part}": shape for name in ("w1", "w2") for part, shape in factors.items()}


DENSE = {
    "diff": ({"diff": (MAX_DENSE >> 13, 1 << 13)}, True),
    "LoKr": ({"lokr_w1": (MAX_DENSE >> 13, 1 << 13), "lokr_w2_a": (1, 1), "lokr_w2_b": (1, 1)}, True),
    "LoHa of many ranks": (loha(23), True),
    "LoHa of few, of which nothing is factorised": (loha(22), False),
}


@pytest.mark.parametrize(("shapes", "counts"), DENSE.values(), ids=DENSE)
def test_what_takes_minutes_to_factorise_is_refused_by_its_header(
    shapes: dict[str, tuple[int, int]], counts: bool
) -> None:
    specs = {f"one.{part}": Spec("F16", shape) for part, shape in shapes.items()}
    assert len(modules(specs)) == 1
    more = specs | {"other.diff": Spec("F16", (1, 2))}
    if counts:
        with pytest.raises(LoRAError, match=f"would have {MAX_DENSE + 2} weights factorised"):
            modules(more)
    else:
        assert len(modules(more)) == 2


@pytest.mark.parametrize("alpha", [-1.0, -float("inf")])
def test_negative_alpha_does_not_hang_the_flux_converter(flux: Family, path: Path, alpha: float) -> None:
    """diffusers halves and doubles until the two scales meet, which below zero they never do."""
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    with at_most(seconds=5), pytest.raises(LoRAError, match="alpha"):
        read(flux, path, keyed(stem, pair(64, 64), KOHYA) | {f"{stem}.alpha": torch.tensor(alpha)})


def pickled(path: Path) -> None:
    torch.save(GOOD, path)


def truncated(path: Path) -> None:
    save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    save_file(GOOD, path)
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    "write",
    [
        truncated,
        longer,
        pickled,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<!doctype html><title>Log in</title>" * 9),
        lambda path: path.write_bytes(b"\xff" * 64),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["truncated", "trailing byte", "pickle renamed", "empty", "web page", "huge header", "folder", "missing"],
)
def test_file_that_is_no_safetensors_is_refused_in_a_sentence(
    model: Family, path: Path, write: Callable[[Path], object]
) -> None:
    write(path)
    for reader in (model.read_lora, origin_of):
        with pytest.raises(LoRAError) as refusal:
            reader(path)
        assert_is_a_sentence(str(refusal.value), path, "cannot be read")
