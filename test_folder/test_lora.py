"""Every spelling of a LoRA file reads as the same layers, exactly; what cannot be applied exactly is refused."""

import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klora.errors import LoRAError
from klora.files import read_lora
from klora.form.request import Request
from klora.layers import attached
from klora.lora import LoRA, LowRank, Plan, save_lora
from klora.models import FAMILIES, load_model, origin_of
from klora.models.family import Family
from klora.models.sdxl import SDXL
from test_folder import tiny

CPU = torch.device("cpu")
Layers = Mapping[str, tuple[Tensor, Tensor]]
BASES = {"sdxl": "sdxl", "flux": "flux-dev"}  # one base of each family

PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
LEGACY = (".lora.down.weight", ".lora.up.weight")
SPELLINGS = {
    "diffusers": ("{component}.{name}", PEFT),
    "adapter": ("{component}.{name}", (".lora_A.default.weight", ".lora_B.default.weight")),
    "legacy": ("{component}.{name}", LEGACY),
    "linear_layer": ("{component}.{name}", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "double": ("{component}.{component}.{name}", LEGACY),
    "processor": ("{component}.{processor}", ("_lora.down.weight", "_lora.up.weight")),
    "cog_sdxl": ("{processor}", ("_lora.down.weight", "_lora.up.weight")),
    "bare": ("{name}", PEFT),
    "raw_peft": ("base_model.model.{name}", PEFT),
    "raw_peft_of_a_pipeline": ("{component}.base_model.model.{name}", PEFT),
    "comfy": ("diffusion_model.{name}", PEFT),
    "civitai": ("{component}.{name}", KOHYA),
    "kohya": ("lora_{component}_{flat}", KOHYA),
    "kohya_unet": ("lora_unet_{flat}", KOHYA),
    "lycoris": ("lycoris_{flat}", KOHYA),
}

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 x 32
KOHYA_Q = f"lora_unet_{Q.replace('.', '_')}"
K = Q.replace("to_q", "to_k")
FLUX_Q = "transformer_blocks.0.attn.to_q"  # 64 x 64
BLOCK_7 = "lora_unet_down_blocks_7_attentions_0_proj_in"
SGM = "lora_unet_input_blocks_3_1"  # down_blocks.1.attentions.0 of the tiny U-Net
BFL_PROJ = "lora_unet_double_blocks_0_img_attn_proj"
POSITIONS = "lora_te1_text_model_embeddings_position_embedding"
CLIP_Q = "text_model_encoder_layers_0_self_attn_q_proj"  # 32 x 32

# BFL's name of a FLUX module: the diffusers modules that share its rows. The blocks' numbers are the same.
BFL = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"],
    "double_blocks.{}.img_attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks.{}.img_mod.lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.{}.txt_attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks.{}.txt_mod.lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.proj_out"],
    "single_blocks.{}.modulation.lin": ["single_transformer_blocks.{}.norm.linear"],
}
BFL_EDGES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


@pytest.fixture(scope="module")
def models(bases: Path) -> dict[str, Family]:
    return {family: load_model(family, bases / base, CPU) for family, base in BASES.items()}


@pytest.fixture(params=FAMILIES)
def model(models: dict[str, Family], request: pytest.FixtureRequest) -> Family:
    return models[request.param]


@pytest.fixture
def sdxl(models: dict[str, Family]) -> Family:
    return models["sdxl"]


@pytest.fixture
def flux(models: dict[str, Family]) -> Family:
    return models["flux"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Break off an endless loop in Python code, after this much CPU time: what else runs does not count."""

    def out_of_time(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def pair(outputs: int, inputs: int, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


def keyed(stem: str, factors: tuple[Tensor, Tensor], endings: tuple[str, str] = PEFT) -> dict[str, Tensor]:
    return {stem + ending: factor for ending, factor in zip(endings, factors, strict=True)}


def spelled(layers: Layers, component: str, spelling: str) -> dict[str, Tensor]:
    template, endings = SPELLINGS[spelling]
    tensors = {}
    for name, factors in layers.items():
        processor = re.sub(r"\.(to_\w+?)(\.0)?$", r".processor.\1", name)
        stem = template.format(component=component, name=name, flat=name.replace(".", "_"), processor=processor)
        tensors |= keyed(stem, factors, endings)
    return tensors


def attention(model: Family) -> dict[str, tuple[int, int]]:
    shapes = tiny.linear_shapes(model.denoiser)
    return {name: shape for name, shape in shapes.items() if re.search(r"\.to_(q|k|v|out\.0)$", name)}


def read(model: Family, path: Path, tensors: Mapping[str, Tensor]) -> LoRA:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return model.read_lora(path)


def assert_same_bits(seen: Mapping[str, LowRank], meant: Layers) -> None:
    assert seen.keys() == meant.keys()
    for name, (A, B) in meant.items():
        assert torch.equal(seen[name].A, A) and torch.equal(seen[name].B, B), name
        assert (seen[name].A.dtype, seen[name].B.dtype) == (A.dtype, B.dtype), name


def delta(factors: tuple[Tensor, Tensor], alpha: float | None = None) -> Tensor:
    """What a file means by one layer: alpha / rank * B A, in float64; without alpha B A."""
    A, B = (factor.double() for factor in factors)
    return B @ A * (1.0 if alpha is None else alpha / len(A))


def assert_same_delta(seen: LowRank, meant: Tensor) -> None:
    """rtol: klora rounds alpha/rank * B to float32 once; products are compared in float64."""
    torch.testing.assert_close(seen.B.double() @ seen.A.double(), meant, rtol=1e-5, atol=1e-6)


# What klora writes.


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


def test_layers_come_in_the_inventorys_order_not_the_files(path: Path) -> None:
    order = ["c", "a", "d", "b"]
    save_file({key: x for name in sorted(order) for key, x in keyed(name, pair(4, 5)).items()}, path)
    assert list(read_lora(path, {"unet": dict.fromkeys(order, (4, 5))}, dict, {})) == order


# Spellings of the denoiser's layers.


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_as_the_same_layers(model: Family, path: Path, spelling: str) -> None:
    meant = tiny.random_lora(attention(model), 2, seed=0)
    assert len(meant) >= 12
    assert_same_bits(read(model, path, spelled(meant, model.component, spelling)), meant)


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name not in ("processor", "cog_sdxl")])
def test_every_linear_of_the_denoiser_can_be_named(model: Family, path: Path, spelling: str) -> None:
    meant = tiny.random_lora(tiny.linear_shapes(model.denoiser), 1, seed=0)
    assert_same_bits(read(model, path, spelled(meant, model.component, spelling)), meant)


def sgm(name: str) -> str:
    """Stability's own name of a linear in a U-Net of one layer a block: input 1 + 2 i + j, output 2 i + j."""
    name = re.sub(r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}", name)
    name = re.sub(r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}", name)
    name = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", name)
    name = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    for side, ours, first in (("down", "input", 1), ("up", "output", 0)):
        for index, kind in enumerate(("resnets", "attentions")):
            block = re.match(rf"{side}_blocks\.(\d)\.{kind}\.(\d)(.*)", name)
            if block:
                name = f"{ours}_blocks.{first + 2 * int(block[1]) + int(block[2])}.{index}{block[3]}"
    return name.replace("time_emb_proj", "emb_layers.1")


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


@pytest.fixture(scope="module")
def full_sdxl(models: dict[str, Family]) -> SDXL:
    """SDXL's U-Net with its published number of blocks, two layers each."""
    return SDXL(StableDiffusionXLPipeline(**models["sdxl"].pipe.components | {"unet": tiny.full_topology_unet()}))


def bfl_modules(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """{BFL's name: the diffusers modules that share its rows} for the two blocks of a kind that the tiny FLUX has."""
    blocks = {bfl.format(i): [part.format(i) for part in parts] for i in (0, 1) for bfl, parts in BFL.items()}
    modules = blocks | {bfl: [name] for bfl, name in BFL_EDGES.items()}
    assert all(name in shapes for names in modules.values() for name in names)
    return modules


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
    flux: Family, path: Path, stem: Callable[[str], str], endings: tuple[str, str]
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


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_any_floating_point_file_is_read_without_loss(model: Family, path: Path, dtype: torch.dtype) -> None:
    drawn = tiny.random_lora(attention(model), 2, seed=0)
    meant = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in drawn.items()}
    seen = read(model, path, spelled(meant, model.component, "diffusers"))
    for name, factors in meant.items():
        assert torch.equal(seen[name].A.double(), factors[0].double()), name
        assert torch.equal(seen[name].B.double(), factors[1].double()), name


# Text encoders.


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
    models: dict[str, Family], path: Path, family: str, stem: str, component: int, module: str, endings: tuple[str, str]
) -> None:
    model = models[family]
    part = ("", "text_encoder", "text_encoder_2")[component]
    shapes = tiny.linear_shapes(model.text_encoders[part])
    (name,) = {module, f"text_model.{module}"} & shapes.keys()
    factors = pair(*shapes[name])
    seen = read(model, path, keyed(stem, factors, endings) | denoiser_layer(family))
    assert seen.text_encoders.keys() == {part}
    assert_same_bits(seen.text_encoders[part], {name: factors})


def denoiser_layer(family: str) -> dict[str, Tensor]:
    stem, size = {"sdxl": (f"unet.{Q}", 32), "flux": (f"transformer.{FLUX_Q}", 64)}[family]
    return keyed(stem, pair(size, size))


# Alpha.


@pytest.mark.parametrize("foreign", [False, True], ids=["diffusers names", "sgm names"])
def test_mixed_alphas_and_ranks_are_folded_exactly(sdxl: Family, path: Path, foreign: bool) -> None:
    tensors, meant = {}, {}
    for seed, (name, shape) in enumerate(tiny.linear_shapes(sdxl.denoiser).items()):
        factors, alpha = pair(*shape, rank=1 + seed % 5, seed=seed), [None, 1.0, 0.3, 16.0][seed % 4]
        stem = f"lora_unet_{(sgm(name) if foreign else name).replace('.', '_')}"
        tensors |= keyed(stem, factors, KOHYA) | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)})
        meant[name] = delta(factors, alpha)
    seen = read(sdxl, path, tensors)
    assert seen.keys() == meant.keys()
    for name in meant:
        assert_same_delta(seen[name], meant[name])


@pytest.mark.parametrize("endings", [PEFT, KOHYA, LEGACY], ids=["peft", "kohya", "legacy"])
def test_alpha_is_read_beside_any_spelling(flux: Family, path: Path, endings: tuple[str, str]) -> None:
    stem, factors = f"transformer.{FLUX_Q}", pair(64, 64, rank=3)
    seen = read(flux, path, keyed(stem, factors, endings) | {f"{stem}.alpha": torch.tensor(2.0)})
    assert_same_delta(seen[FLUX_Q], delta(factors, 2.0))


def test_text_encoders_alpha_is_folded_too(sdxl: Family, path: Path) -> None:
    stem, factors = f"lora_te2_{CLIP_Q}", pair(32, 32, rank=3)
    seen = read(sdxl, path, denoiser_layer("sdxl") | keyed(stem, factors, KOHYA) | {f"{stem}.alpha": torch.tensor(2.0)})
    (layer,) = seen.text_encoders["text_encoder_2"].values()
    assert_same_delta(layer, delta(factors, 2.0))


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(3.0, dtype=torch.float16),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor(3.0, dtype=torch.float64),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([3.0]),
    ],
    ids=["fp16", "bf16", "fp64", "int64", "vector of one"],
)
def test_alpha_may_be_a_number_of_any_dtype(sdxl: Family, path: Path, alpha: Tensor) -> None:
    factors = pair(32, 32, rank=2)
    seen = read(sdxl, path, keyed(KOHYA_Q, factors, KOHYA) | {f"{KOHYA_Q}.alpha": alpha})
    assert_same_delta(seen[Q], delta(factors, 3.0))


def test_alpha_of_a_half_precision_file_is_folded_without_rounding_to_half(sdxl: Family, path: Path) -> None:
    A, B = (factor.half() for factor in pair(32, 32, rank=3))
    seen = read(sdxl, path, keyed(KOHYA_Q, (A, B), KOHYA) | {f"{KOHYA_Q}.alpha": torch.tensor(0.1)})
    assert_same_delta(seen[Q], delta((A, B), 0.1))


# Alpha in the header, as diffusers writes it; peft is the oracle.


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


# The whole image, against diffusers' own loader.


def picture(model: Family, lora: LoRA) -> np.ndarray:
    """Levels [64, 64, 3] in 0 .. 255 of one image with one LoRA everywhere."""
    with torch.no_grad(), ExitStack() as loans:
        for component, encoder in model.text_encoders.items():
            part = lora.text_encoders.get(component, {})
            loans.enter_context(attached(encoder, Plan.constant((part,), (1.0,))))
        conditioning = model.encode_prompt(["a photo of a sks dog"])
        loans.enter_context(attached(model.denoiser, Plan.constant((lora,), (1.0,))))
        request = Request("a photo of a sks dog", num_inference_steps=4, seed=3)
        return np.asarray(model.sample(conditioning, request, lambda step: None)[0], dtype=int)


def diffusers_picture(pipeline: DiffusionPipeline, path: Path, guidance_scale: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path)
    call = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "width": 64, "height": 64}
    image = pipeline("a photo of a sks dog", generator=torch.Generator().manual_seed(3), **call).images[0]
    return np.asarray(image, dtype=int)


def kohya_encoder(number: int, encoder: nn.Module) -> dict[str, Tensor]:
    """A text encoder's attention and feed-forward layers as kohya writes them; diffusers skips the projection."""
    layers = tiny.random_lora(tiny.linear_shapes(encoder), 2, seed=number, std=0.3, alpha=1.0)
    flat = {
        f"lora_te{number}_text_model_{n.removeprefix('text_model.').replace('.', '_')}": f for n, f in layers.items()
    }
    flat = {stem: factors for stem, factors in flat.items() if "_layers_" in stem}
    alphas = {f"{stem}.alpha": torch.tensor(1.0) for stem in flat}
    return alphas | {key: x for stem, factors in flat.items() for key, x in keyed(stem, factors, KOHYA).items()}


def diffusers_file(model: Family, encoders: list[str]) -> dict[str, Tensor]:
    tensors = spelled(tiny.random_lora(tiny.linear_shapes(model.denoiser), 4, seed=1), model.component, "diffusers")
    for component in encoders:
        layers = tiny.random_lora(tiny.linear_shapes(model.text_encoders[component]), 2, seed=2, std=0.3)
        tensors |= spelled(layers, component, "diffusers")
    return tensors


def kohya_file(model: Family, encoders: list[str]) -> dict[str, Tensor]:
    """One alpha and the layers of the blocks: diffusers mixes up different alphas and the embeddings' names."""
    shapes = tiny.linear_shapes(model.denoiser)
    if model.component == "unet":
        shapes = {n: s for n, s in shapes.items() if ".transformer_blocks." in n}
        stems = {f"lora_unet_{sgm(n).replace('.', '_')}": s for n, s in shapes.items()}
    else:
        modules = {bfl: parts for bfl, parts in bfl_modules(shapes).items() if "blocks" in bfl}
        rows = {bfl: (sum(shapes[n][0] for n in parts), shapes[parts[0]][1]) for bfl, parts in modules.items()}
        stems = {f"lora_unet_{bfl.replace('.', '_')}": shape for bfl, shape in rows.items()}
    layers = tiny.random_lora(stems, 4, seed=1, alpha=2.0)
    tensors = {key: x for stem, factors in layers.items() for key, x in keyed(stem, factors, KOHYA).items()}
    tensors |= {f"{stem}.alpha": torch.tensor(2.0) for stem in layers}
    for number, component in enumerate(encoders, start=1):
        tensors |= kohya_encoder(number, model.text_encoders[component])
    return tensors


@pytest.mark.parametrize("file", [diffusers_file, kohya_file], ids=["diffusers", "kohya"])
def test_image_is_the_one_that_diffusers_makes_with_the_file(
    model: Family, path: Path, file: Callable[[Family, list[str]], dict[str, Tensor]]
) -> None:
    """One level of 255: the merged weight and peft's two products round differently; the LoRA moves tens of levels."""
    loaded = {StableDiffusionXLPipeline: ["text_encoder", "text_encoder_2"], FluxPipeline: ["text_encoder"]}
    lora = read(model, path, file(model, loaded[type(model.pipe)]))
    assert list(lora.text_encoders) == loaded[type(model.pipe)]
    seen, plain, without_encoders = (picture(model, each) for each in (lora, LoRA({}), LoRA(lora.layers)))
    pipeline = type(model.pipe).from_pretrained(model.pipe.config._name_or_path)
    meant = diffusers_picture(pipeline, path, model.guidance_scale)
    assert np.abs(seen - meant).max() <= 1
    assert np.abs(seen - plain).mean() > 5
    assert np.abs(seen - without_encoders).mean() > 1


# Refusals.


GOOD = keyed(f"unet.{Q}", pair(32, 32))
GOOD_FLUX = keyed(f"transformer.{FLUX_Q}", pair(64, 64))


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
    "FLUX to SDXL": ("sdxl", GOOD_FLUX, f"'transformer.{FLUX_Q}', which this base does not have"),
    "FLUX of kohya to SDXL": ("sdxl", kohya_layer(BFL_PROJ, 64, 64), f"'{BFL_PROJ}', which this base does not have"),
    "SDXL of kohya to FLUX": ("flux", kohya_layer(KOHYA_Q, 32, 32), f"'{KOHYA_Q}', which this base does not have"),
    "one layer twice": ("sdxl", GOOD | kohya_layer(KOHYA_Q, 32, 32), f"'{Q}' twice"),
    "some unknown to SDXL": ("sdxl", GOOD | keyed("mystery", pair(32, 32)), "'mystery', which this base"),
    "block that SDXL lacks": ("sdxl", GOOD | kohya_layer(BLOCK_7, 32, 32), f"'{BLOCK_7}', which this base"),
    "block that FLUX lacks": ("flux", kohya_layer(BFL_PROJ.replace("0", "30"), 64, 64), "double_blocks_30"),
    "SDXL to FLUX": ("flux", GOOD, f"'unet.{Q}', which this base does not have"),
    "some unknown to FLUX": ("flux", GOOD_FLUX | keyed("mystery", pair(32, 32)), "'mystery', which this base"),
    "XLabs' block that FLUX lacks": (
        *("flux", keyed("double_blocks.30.processor.qkv_lora1", pair(192, 64), (".down.weight", ".up.weight"))),
        "double_blocks.30",
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
    models: dict[str, Family], path: Path, family: str, tensors: dict[str, Tensor], seen: str
) -> None:
    with at_most(seconds=5), pytest.raises(LoRAError) as refusal:
        read(models[family], path, tensors)
    assert_is_a_sentence(str(refusal.value), path, seen)


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


def assert_is_a_sentence(message: str, path: Path, seen: str) -> None:
    """What was wrong with which file, what was seen, what is accepted; on one line, without the file's folder."""
    assert message.startswith(path.name) and message.endswith(".") and "\n" not in message
    assert seen in message and "Expected" in message, message


# Whose LoRA it is.


def family_of(keys: list[str], path: Path) -> str | None:
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    origin = origin_of(path)
    return origin and origin.family


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_exactly_one_family_recognises_a_spelling(models: dict[str, Family], path: Path, spelling: str) -> None:
    for family, model in models.items():
        keys = list(spelled(tiny.random_lora(attention(model), 1, seed=0), model.component, spelling))
        assert [name for name, kind in FAMILIES.items() if kind.recognises(keys)] == [family]
        assert family_of(keys, path) == family


def test_foreign_spellings_are_recognised(models: dict[str, Family], path: Path) -> None:
    """By any one key of a denoiser's block."""
    modules = {"sdxl": [sgm(name) for name in attention(models["sdxl"])], "flux": [name.format(0) for name in BFL]}
    for family, names in modules.items():
        for name in names:
            assert family_of([f"lora_unet_{name.replace('.', '_')}.lora_down.weight"], path) == family
            assert family_of([f"diffusion_model.{name}.lora_A.weight"], path) == family


@pytest.mark.parametrize(
    "keys",
    [[], ["mystery.lora_A.weight"], [f"lora_te1_{CLIP_Q}.lora_down.weight"]],
    ids=["no keys", "nonsense", "text encoder alone"],
)
def test_keys_of_no_known_family_have_none(path: Path, keys: list[str]) -> None:
    assert family_of(keys, path) is None


# The data.


def test_lora_is_the_mapping_of_its_denoiser_layers() -> None:
    layers = {name: LowRank(*pair(4, 5)) for name in "ba"}
    lora = LoRA(layers, {"text_encoder": {"x": LowRank(*pair(4, 5))}})
    assert dict(lora) == layers and list(lora) == ["b", "a"] and len(lora) == 2
    assert "x" not in lora and lora.get("x") is None


def test_constant_plan_lets_every_lora_act_always_at_its_scale() -> None:
    first, second = ({name: LowRank(*pair(4, 5)) for name in names} for names in ("ab", "bc"))
    plan = Plan.constant((first, second), (0.5, -2.0))
    assert plan.layers == ("a", "b", "c")
    assert plan.loras == (first, second)
    assert torch.equal(plan.gates, torch.tensor([[[0.5, -2.0]] * 3]))


# Where it is lent


def placeable(rows: int = 6) -> LoRA:
    generator = torch.Generator().manual_seed(rows)
    pair = LowRank(torch.randn(2, 4, generator=generator).half(), torch.randn(rows, 2, generator=generator).half())
    return LoRA({"a": pair})


def test_a_lora_remembers_where_it_was_last_and_nothing_older() -> None:
    lora, cpu = placeable(), torch.device("cpu")
    there = lora.placed(cpu, torch.float32)
    assert there["a"].A.dtype == there["a"].B.dtype == torch.float32
    assert torch.equal(there["a"].B, lora["a"].B.float()) and lora["a"].B.dtype == torch.float16
    assert lora.placed(cpu, torch.float32) is there
    elsewhere = lora.placed(cpu, torch.float64)
    assert elsewhere["a"].A.dtype == torch.float64
    assert lora.placed(cpu, torch.float32) is not there


def test_a_large_lora_is_placed_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, cpu = placeable(), torch.device("cpu")
    nbytes = 4 * (2 * 4 + 6 * 2)
    for most, kept in ((nbytes, True), (nbytes - 1, False)):
        monkeypatch.setattr("klora.lora.PLACED_BYTES", most)
        lora = placeable()
        assert (lora.placed(cpu, torch.float32) is lora.placed(cpu, torch.float32)) == kept
