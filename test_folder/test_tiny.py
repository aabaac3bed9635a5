"""The tiny models are what the tests believe they are: complete, deterministic, and shaped like the published ones."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPTokenizer, T5TokenizerFast

from test_folder import tiny

PIPELINES = {"sdxl": StableDiffusionXLPipeline, "flux-dev": FluxPipeline, "flux-schnell": FluxPipeline}
SENTENCE = "a photo of a sks dog in watercolor style"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make these tests ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(bases: Path, request: pytest.FixtureRequest) -> DiffusionPipeline:
    return PIPELINES[request.param].from_pretrained(bases / request.param)


def image(pipeline: DiffusionPipeline, prompt: str = SENTENCE, seed: int = 0) -> np.ndarray:
    """Pixels [64, 64, 3] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "np"}
    return pipeline(prompt, generator=generator, **call).images[0]


def denoiser(pipeline: DiffusionPipeline) -> tuple[str, torch.nn.Module]:
    prefix = "unet" if hasattr(pipeline, "unet") else "transformer"
    return prefix, getattr(pipeline, prefix)


def attention_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in tiny.linear_shapes(model).items() if re.search(r"\.attn\d?\.", name)}


def test_same_seed_makes_the_same_image_and_it_shows_something(pipeline: DiffusionPipeline) -> None:
    first, second = image(pipeline), image(pipeline)
    assert first.shape == (64, 64, 3)
    assert first.std() > 0.05
    assert np.array_equal(first, second)


@pytest.mark.parametrize("change", [{"prompt": "an oil painting of a red castle"}, {"seed": 1}], ids=["prompt", "seed"])
def test_image_depends_on_prompt_and_seed(pipeline: DiffusionPipeline, change: dict) -> None:
    assert np.abs(image(pipeline) - image(pipeline, **change)).max() > 4 / 255


def test_sdxl_is_native_at_64_pixels(bases: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(bases / "sdxl")
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64


def test_building_twice_gives_equal_weights_and_leaves_the_random_state_alone(bases: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = tiny.build_flux(tmp_path / "again")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (bases / "flux-dev" / weights).read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bases_already_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sdxl").mkdir()
    tiny.build_bases(tmp_path)
    assert not list((tmp_path / "sdxl").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {
        "sdxl",
        "illustrious-xl",
        "flux-dev",
        "flux-schnell",
        "safety-checker",
    }


@pytest.mark.parametrize(
    ("folder", "kind", "length"),
    [
        ("sdxl/tokenizer", CLIPTokenizer, 77),
        ("sdxl/tokenizer_2", CLIPTokenizer, 77),
        ("flux-dev/tokenizer_2", T5TokenizerFast, 512),
    ],
)
def test_tokenizer_gives_distinct_words_distinct_ids_and_back(
    bases: Path, folder: str, kind: type, length: int
) -> None:
    tokenizer = kind.from_pretrained(bases / folder)
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    assert tokenizer.model_max_length == length
    assert len(set(ids)) == len(set(SENTENCE.split()))
    assert tokenizer.decode(ids) == SENTENCE


def test_both_clip_tokenizers_agree_but_for_the_padding(bases: Path) -> None:
    first, second = (CLIPTokenizer.from_pretrained(bases / "sdxl" / name) for name in ("tokenizer", "tokenizer_2"))
    assert first(SENTENCE).input_ids == second(SENTENCE).input_ids
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")


def test_clip_spells_what_it_has_never_seen(bases: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(bases / "sdxl" / "tokenizer")
    assert tokenizer.decode(tokenizer("Zürich ☃", add_special_tokens=False).input_ids) == "zürich ☃"


def test_vae_encodes_to_latents_of_about_unit_variance(pipeline: DiffusionPipeline) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    assert 0.3 < float(posterior.mean.std() * pipeline.vae.config.scaling_factor) < 3
    assert float(posterior.std.max()) < 1e-3


def test_full_topology_unet_has_560_attention_linears() -> None:
    shapes = tiny.linear_shapes(tiny.full_topology_unet())
    attention = [name for name in shapes if re.search(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$", name)]
    assert len(attention) == 560


def test_full_topology_flux_has_494_linears_in_its_blocks() -> None:
    model = tiny.full_topology_flux()
    in_blocks = [name for name in tiny.linear_shapes(model) if re.match(r"(single_)?transformer_blocks\.", name)]
    assert len(in_blocks) == 494


def test_full_topology_flux_has_190_attention_linears_of_images() -> None:
    """190 = 19 double blocks x 4 + 38 single blocks x 3; the text side (add_*) is not counted."""
    shapes = tiny.linear_shapes(tiny.full_topology_flux())
    assert len([name for name in shapes if re.search(r"\.attn\.(to_q|to_k|to_v|to_out\.0)$", name)]) == 190


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("build", "inputs", "shape"),
    [
        (tiny.full_topology_unet, tiny.unet_inputs, (2, 4, 8, 8)),
        (tiny.full_topology_flux, tiny.flux_inputs, (2, 16, 64)),
    ],
    ids=["unet", "flux"],
)
def test_inputs_fit_the_model(build: Callable, inputs: Callable, shape: tuple[int, ...], device: str) -> None:
    with torch.device(device), torch.no_grad():
        model = build()
        output = model(**inputs(model, batch=2, device=device)).sample
    assert output.shape == shape


@pytest.mark.parametrize("flags", [True, False])
def test_safety_checker_flags_all_or_none(tmp_path: Path, flags: bool) -> None:
    folder = tiny.build_safety_checker(tmp_path / "checker", flags=flags)
    checker = StableDiffusionSafetyChecker.from_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    pictures = [Image.new("RGB", (64, 64), "white"), Image.fromarray(noise)]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    _, flagged = checker(clip_input=pixels, images=[np.asarray(picture) for picture in pictures])
    assert flagged == [flags, flags]


def test_random_lora_applies_the_same_whatever_alpha_the_file_says() -> None:
    plain, folded = (tiny.random_lora({"layer": (6, 5)}, rank=4, seed=0, alpha=alpha)["layer"] for alpha in (None, 2.0))
    torch.testing.assert_close(folded[1] @ folded[0] * 2.0 / 4, plain[1] @ plain[0])


@pytest.mark.parametrize("style", ["diffusers", "legacy", "double", "kohya"])
@pytest.mark.parametrize("prefix", ["unet", "transformer"])
def test_every_layer_has_its_keys_in_the_file(tmp_path: Path, style: str, prefix: str) -> None:
    layers = tiny.random_lora({"blocks.0.attn.to_out.0": (6, 5), "blocks.0.attn.to_q": (4, 5)}, seed=0)
    tensors = load_file(tiny.save_lora(tmp_path / "lora.safetensors", layers, style, prefix))
    for name, (A, B) in layers.items():
        A_key, B_key = tiny.lora_keys(name, style, prefix)
        assert torch.equal(tensors.pop(A_key), A)
        assert torch.equal(tensors.pop(B_key), B)
    assert not tensors


# "double" is not here: stock diffusers does not read it.
@pytest.mark.parametrize(
    ("style", "alpha"), [("diffusers", None), ("diffusers", 2.0), ("legacy", None), ("kohya", 2.0)]
)
def test_stock_diffusers_reads_the_file_as_it_was_meant(
    pipeline: DiffusionPipeline, tmp_path: Path, style: str, alpha: float | None
) -> None:
    prefix, model = denoiser(pipeline)
    layers = tiny.random_lora(attention_shapes(model), seed=0, alpha=alpha)
    meant = {name: (B @ A) * (1.0 if alpha is None else alpha / 4) for name, (A, B) in layers.items()}
    pipeline.load_lora_weights(
        tiny.save_lora(tmp_path / "lora.safetensors", layers, style, prefix, alpha), adapter_name="x"
    )
    read = {name: model.get_submodule(name).get_delta_weight("x").detach() for name in meant}
    pipeline.unload_lora_weights()
    torch.testing.assert_close(read, meant)


def test_random_lora_changes_the_image_visibly(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    prefix, model = denoiser(pipeline)
    before = image(pipeline)
    layers = tiny.random_lora(attention_shapes(model), seed=0)
    pipeline.load_lora_weights(tiny.save_lora(tmp_path / "lora.safetensors", layers, prefix=prefix))
    after = image(pipeline)
    pipeline.unload_lora_weights()
    assert np.abs(after - before).max() > 20 / 255
    assert np.array_equal(image(pipeline), before)
