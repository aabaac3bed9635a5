"""Stability's own names of a U-Net's layers are those layers, in the tiny one and in the published one."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

from klora.models.family import Family
from klora.models.sdxl import SDXL
from test_folder import tiny
from test_folder.files.reading import assert_same_bits, pair, read
from test_folder.files.spelling import KOHYA, attention, keyed, sgm, spelled


@pytest.mark.parametrize("spelling", ["kohya", "civitai", "comfy"])
def test_file_with_sgm_names_reads_as_the_same_layers(sdxl: Family, path: Path, spelling: str) -> None:
    meant = tiny.random_lora(tiny.linear_shapes(sdxl.denoiser), 2, seed=0)
    foreign = {sgm(name): factors for name, factors in meant.items()}
    assert len(foreign) == len(meant) and "output_blocks.3.1.proj_in" in foreign
    assert_same_bits(read(sdxl, path, spelled(foreign, "unet", spelling)), meant)


def test_foreign_and_own_names_may_share_a_file(sdxl: Family, path: Path) -> None:
    meant = tiny.random_lora(attention(sdxl), 2, seed=0)
    half = dict(list(meant.items())[::2])
    foreign = {sgm(name): factors for name, factors in half.items()}
    own = {name: factors for name, factors in meant.items() if name not in half}
    assert_same_bits(read(sdxl, path, spelled(foreign, "unet", "kohya") | spelled(own, "unet", "diffusers")), meant)


@pytest.fixture(scope="module")
def full_sdxl(families: dict[str, Family]) -> SDXL:
    """SDXL's U-Net with its published number of blocks, two layers each."""
    return SDXL(StableDiffusionXLPipeline(**families["sdxl"].pipe.components | {"unet": tiny.full_topology_unet()}))


@pytest.mark.parametrize(
    ("published", "name"),
    [
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks_5_1_proj_in", "down_blocks.1.attentions.1.proj_in"),
        ("input_blocks_7_1_transformer_blocks_9_ff_net_2", "down_blocks.2.attentions.0.transformer_blocks.9.ff.net.2"),
        ("input_blocks_8_1_proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("middle_block_1_transformer_blocks_3_ff_net_2", "mid_block.attentions.0.transformer_blocks.3.ff.net.2"),
        ("output_blocks_0_1_proj_in", "up_blocks.0.attentions.0.proj_in"),
        (
            "output_blocks_2_1_transformer_blocks_0_attn2_to_k",
            "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k",
        ),
        ("output_blocks_5_1_proj_in", "up_blocks.1.attentions.2.proj_in"),
    ],
)
def test_sgm_numbers_are_those_of_published_sdxl(full_sdxl: Family, path: Path, published: str, name: str) -> None:
    factors = pair(*tiny.linear_shapes(full_sdxl.denoiser)[name])
    assert_same_bits(read(full_sdxl, path, keyed(f"lora_unet_{published}", factors, KOHYA)), {name: factors})
