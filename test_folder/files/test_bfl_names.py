"""BFL's own names of FLUX's layers, whose rows several of diffusers' layers share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from klora.files import read_lora
from klora.files.names import located
from klora.lora import LowRank
from klora.models.family import Family
from test_folder import tiny
from test_folder.files.reading import assert_same_delta, delta, pair, read
from test_folder.files.spelling import BFL, KOHYA, PEFT, Endings, bfl_modules, keyed


@pytest.mark.parametrize(
    ("stem", "endings"),
    [
        (lambda bfl: f"lora_unet_{bfl.replace('.', '_')}", KOHYA),
        (lambda bfl: f"diffusion_model.{bfl}", KOHYA),
        (lambda bfl: f"diffusion_model.{bfl}", PEFT),
        (lambda bfl: bfl, PEFT),
    ],
    ids=["kohya", "comfy", "ai_toolkit", "bare"],
)
def test_bfl_module_is_its_diffusers_parts_row_by_row(
    flux: Family, path: Path, stem: Callable[[str], str], endings: Endings
) -> None:
    shapes = tiny.linear_shapes(flux.denoiser)
    tensors, meant = {}, {}
    for seed, (bfl, names) in enumerate(bfl_modules(shapes).items()):
        rank, alpha = 1 + seed % 4, [None, 0.5, 3.0, 16.0][seed // 2 % 4]
        factors = pair(sum(shapes[name][0] for name in names), shapes[names[0]][1], rank, seed)
        tensors |= keyed(stem(bfl), factors, endings)
        if alpha is not None:
            tensors[f"{stem(bfl)}.alpha"] = torch.tensor(alpha)
        rows = delta(factors, alpha).split([shapes[name][0] for name in names])
        meant |= dict(zip(names, rows, strict=True))
    seen = read(flux, path, tensors)
    assert seen.keys() == meant.keys()
    for name, rows in meant.items():
        assert_same_delta(seen[name], rows)


def test_block_diagonal_qkv_is_split_without_loss(flux: Family, path: Path) -> None:
    """Trainers that keep q, k and v apart write them as one fused layer of three times the rank."""
    parts = [pair(64, 64, 2, seed) for seed in range(3)]
    fused = torch.cat([A for A, _ in parts]), torch.block_diag(*(B for _, B in parts))
    seen = read(flux, path, keyed("lora_unet_double_blocks_1_img_attn_qkv", fused, KOHYA))
    for part, factors in zip("qkv", parts, strict=True):
        assert_same_delta(seen[f"transformer_blocks.1.attn.to_{part}"], delta(factors))


def test_bfls_last_modulation_is_shift_then_scale_and_diffusers_scale_then_shift(flux: Family, path: Path) -> None:
    stem, factors = "lora_unet_final_layer_adaLN_modulation_1", pair(128, 64)
    seen = read(flux, path, keyed(stem, factors, KOHYA) | {f"{stem}.alpha": torch.tensor(0.5)})
    shift, scale = delta(factors, 0.5).chunk(2)
    assert_same_delta(seen["norm_out.linear"], torch.cat([scale, shift]))


@pytest.mark.usefixtures("bfloat16_by_default")
def test_every_module_of_a_published_file_finds_its_layers_whatever_torchs_default_dtype_is() -> None:
    """266 modules, of which bfloat16 could not number the last ones."""
    blocks = {"double_blocks": 19, "single_blocks": 38}
    modules = {
        bfl.format(i): [name.format(i) for name in names]
        for bfl, names in BFL.items()
        for i in range(blocks[bfl.partition(".")[0]])
    }
    inventory = {"transformer": {name: (4, 4) for names in modules.values() for name in names}}
    pairs = {
        f"lora_unet_{bfl.replace('.', '_')}": LowRank(*pair(4 * len(names), 4, seed=seed))
        for seed, (bfl, names) in enumerate(modules.items())
    }
    seen = located(pairs, inventory, FluxPipeline.lora_state_dict)
    assert len(pairs) == 266
    for module, names in zip(pairs.values(), modules.values(), strict=True):
        found = [seen["transformer", name] for name in names]
        assert torch.equal(torch.cat([layer.B for layer in found]), module.B)
        assert all(torch.equal(layer.A, module.A) for layer in found)


@pytest.mark.parametrize("rank", [3, 4], ids=["shared", "divisible by four"])
def test_linear1_of_full_width_is_q_k_v_and_mlp(path: Path, rank: int) -> None:
    """diffusers knows the rows of linear1 for the published width alone: 3 x 3072 + 12288."""
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    block, stem = "single_transformer_blocks.37", "lora_unet_single_blocks_37_linear1"
    (A, B), alpha, probe = pair(21504, 3072, rank), 2.0, torch.randn(3072, 2, dtype=torch.float64)
    save_file(keyed(stem, (A, B), KOHYA) | {f"{stem}.alpha": torch.tensor(alpha)}, path)
    inventory = {"transformer": {f"{block}.{part}": (outputs, 3072) for part, outputs in rows.items()}}
    seen = read_lora(path, inventory, FluxPipeline.lora_state_dict, {})
    meant = (alpha / rank * (B.double() @ (A.double() @ probe))).split(list(rows.values()))
    for part, product in zip(rows, meant, strict=True):
        layer = seen[f"{block}.{part}"]
        torch.testing.assert_close(layer.B.double() @ (layer.A.double() @ probe), product, rtol=1e-5, atol=1e-4)
