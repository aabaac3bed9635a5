"""A base that is one file, under its authors' own names, is what the same weights are as a diffusers folder."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from klora.bases.install import ensure_base
from klora.bases.table import BASES
from klora.errors import BaseModelError
from klora.form.request import Request
from klora.generation import generate
from klora.models import checkpoint_in, load_model
from klora.models.family import EVERY_PART, Family, Part
from klora.report.inspection import inspect
from klora.studio import Studio
from klora.studio.bases import _bytes_of
from klora.training.job import TrainingBase, run_training
from test_folder import tiny
from test_folder.checkpoint import build_single_file
from test_folder.fakes.base_hub import Server, contents, serving
from test_folder.jobs.short import held, weights_of
from test_folder.trainer.material import SETTINGS

CPU = torch.device("cpu")
FILE = "Illustrious-XL-v1.0.safetensors"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights in fp16, as diffusers' folder and as one file."""
    return build_single_file(tmp_path_factory.mktemp("models"), FILE)


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> tuple[Family, Family]:
    diffusers_format, single = (load_model("sdxl", folder, CPU) for folder in folders)
    return diffusers_format, single


@pytest.fixture
def copy(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """The folder of the one file, to be spoilt."""
    return Path(shutil.copytree(folders[1], tmp_path / "copy"))


def part_of(model: Family, name: str) -> nn.Module:
    part: nn.Module = getattr(model.pipe, name)
    return part


def refusal(folder: Path, parts: tuple[Part, ...] = EVERY_PART) -> str:
    """The one sentence, or the two, of a folder that cannot be loaded."""
    with pytest.raises(BaseModelError) as error:
        load_model("sdxl", folder, CPU, parts=parts)
    assert str(error.value).startswith(f"The base in {folder} cannot be loaded as sdxl: ")
    assert "\n" not in str(error.value)
    return str(error.value).split(" as sdxl: ")[1]


# What is loaded.


def test_the_folder_holds_one_weight_file_under_other_names(folders: tuple[Path, Path]) -> None:
    diffusers_format, single = folders
    assert [path.name for path in single.rglob("*.safetensors")] == [FILE]
    assert checkpoint_in(single) == single / FILE and checkpoint_in(diffusers_format) is None
    tensors = load_file(single / FILE)
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.output_blocks.0.1.transformer_blocks.1.attn2.to_k.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
    } <= tensors.keys()
    assert len({tensor.numpy().tobytes() for tensor in tensors.values()}) == len(tensors)  # none can stand for another


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_is_the_stored_one(models: tuple[Family, Family], folders: tuple[Path, Path], part: str) -> None:
    """Of diffusers' own files, and of the model that is loaded from them."""
    [file] = (folders[0] / part).glob("*.safetensors")
    stored, expected, seen = (
        load_file(file),
        part_of(models[0], part).state_dict(),
        part_of(models[1], part).state_dict(),
    )
    assert seen.keys() == expected.keys() and len(stored) == len(list(part_of(models[1], part).parameters()))
    assert all(torch.equal(seen[name], expected[name]) and seen[name].dtype == torch.float32 for name in seen)
    by_name = {name.removeprefix("text_model."): tensor for name, tensor in seen.items()}
    assert all(torch.equal(by_name[name.removeprefix("text_model.")], stored[name].float()) for name in stored)


def test_configs_and_scheduler_are_those_of_the_folder(models: tuple[Family, Family]) -> None:
    for name in ("unet", "vae", "scheduler"):
        first, second = (dict(getattr(model.pipe, name).config) for model in models)
        differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
        assert differing <= {"_name_or_path", "_use_default_values", "_class_name"}, name
    assert models[0].pipe.config.force_zeros_for_empty_prompt is models[1].pipe.config.force_zeros_for_empty_prompt
    assert models[0].native_size == models[1].native_size == 64


def test_the_images_are_the_same_with_and_without_a_lora(models: tuple[Family, Family], tmp_path: Path) -> None:
    layers = tiny.random_lora(tiny.linear_shapes(models[0].denoiser), 4, seed=0)
    path = tiny.save_lora(tmp_path / "lora.safetensors", layers)
    for scale in (0.0, 1.0):
        request = Request("a photo of a dog", seed=3, num_inference_steps=3, content_scale=scale)
        first, second = (
            np.asarray(generate(model, request, content=model.read_lora(path))[0], dtype=int) for model in models
        )
        assert np.array_equal(first, second)
        assert len(np.unique(first)) > 50  # it is an image


def test_half_precision_reaches_every_part_but_the_vae_which_keeps_what_is_stored(
    folders: tuple[Path, Path], models: tuple[Family, Family]
) -> None:
    """bfloat16 on the way would have cost the VAE three of its bits."""
    half = load_model("sdxl", folders[1], CPU, torch.bfloat16)
    assert {part: part_of(half, part).dtype for part in PARTS} == {
        part: torch.float32 if part == "vae" else torch.bfloat16 for part in PARTS
    }
    for part in PARTS:
        full = part_of(models[0], part).state_dict()
        seen = part_of(half, part).state_dict()
        assert all(torch.equal(seen[name], full[name].to(seen[name].dtype)) for name in full)


# Parts.


@pytest.mark.parametrize("wanted", [("denoiser",), ("text", "vae"), ()])
def test_of_parts_that_are_not_wanted_there_are_shapes_or_nothing(
    folders: tuple[Path, Path], wanted: tuple[Part, ...]
) -> None:
    first, second = (load_model("sdxl", folder, CPU, parts=wanted) for folder in folders)
    for part in PARTS:
        expected, seen = getattr(first.pipe, part), getattr(second.pipe, part)
        assert (seen is None) == (expected is None)
        if seen is not None:
            assert {p.device for p in seen.parameters()} == {p.device for p in expected.parameters()}
            assert {name: p.shape for name, p in seen.named_parameters()} == {
                name: p.shape for name, p in expected.named_parameters()
            }


def test_a_lora_can_be_inspected_against_it(
    folders: tuple[Path, Path], models: tuple[Family, Family], tmp_path: Path
) -> None:
    layers = tiny.random_lora(tiny.linear_shapes(models[0].denoiser), 4, seed=0)
    path = tiny.save_lora(tmp_path / "lora.safetensors", layers)
    assert inspect(path, {"illustrious-xl": ("sdxl", folders[1])}).fits == ("illustrious-xl",)


def test_a_lora_is_trained_on_it_as_on_the_same_weights_in_a_folder(
    folders: tuple[Path, Path], tmp_path: Path, few_points: None
) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "red.png")
    tars = []
    for number, folder in enumerate(folders):
        base = TrainingBase("illustrious-xl", "sdxl", folder, "owner/name", "Apache-2.0", tmp_path, FILE)
        given = {**SETTINGS, "steps": 2, "sample_steps": 1}
        tars.append(held(run_training(base, tmp_path / "pictures", given, tmp_path / f"{number}.tar")))
    trained = [weights_of(tar) for tar in tars]
    assert trained[0] == trained[1] and any(map(any, trained[0].values()))
    assert tars[0]["samples/step_000002_0.png"] == tars[1]["samples/step_000002_0.png"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_counted_as_the_same_weights_in_a_folder(folders: tuple[Path, Path], dtype: torch.dtype) -> None:
    """But for the headers: at most 200 bytes a tensor, and a scalar that is not loaded."""
    weights = sum(tensor.numel() for file in folders[0].rglob("*.safetensors") for tensor in load_file(file).values())
    for folder in folders:
        assert 0 <= _bytes_of(folder, dtype) - weights * dtype.itemsize < 200 * 2000


def test_what_does_not_fit_is_refused_before_it_is_loaded(folders: tuple[Path, Path]) -> None:
    needed = _bytes_of(folders[1], torch.float32)
    studio = Studio(lambda *_: ("", "", Path()), Path("no-checker"), CPU, lambda device: needed - 1)
    with pytest.raises(BaseModelError, match=r"^illustrious-xl needs 0\.0 GB of memory on cpu"):
        studio.load("illustrious-xl", "sdxl", folders[1])


# What cannot be loaded.


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("parts", [EVERY_PART, ()])
@pytest.mark.parametrize("damage", [cut_off, lambda file: file.write_bytes(b"")], ids=["cut off", "empty"])
def test_a_damaged_file_is_refused_in_a_sentence(
    copy: Path, damage: Callable[[Path], None], parts: tuple[Part, ...]
) -> None:
    damage(copy / FILE)
    assert str(copy / FILE) in refusal(copy, parts)


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "model.diffusion_model.",
        "first_stage_model.quant_conv.weight",
        "first_stage_model.",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
        "conditioner.embedders.1.",
        "conditioner.",
    ],
)
def test_what_is_lacking_is_refused_and_never_made_up(copy: Path, lost: str) -> None:
    tensors = load_file(copy / FILE)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    assert len(kept) < len(tensors)
    save_file(kept, copy / FILE)
    assert refusal(copy) == f"{FILE} lacks tensors of its parts. Fetch the base again."


def test_a_file_without_the_first_text_encoder_does_not_get_the_seconds(copy: Path) -> None:
    tensors = load_file(copy / FILE)
    save_file({name: tensors[name] for name in tensors if not name.startswith("conditioner.embedders.0.")}, copy / FILE)
    assert "CLIP" in refusal(copy)


def test_a_tensor_of_another_shape_is_refused(copy: Path) -> None:
    tensors = load_file(copy / FILE)
    save_file(tensors | {"model.diffusion_model.out.2.bias": torch.zeros(5)}, copy / FILE)
    assert "conv_out.bias expected shape" in refusal(copy)


@pytest.mark.parametrize("others", [("loras.safetensors",), ("vae/diffusion_pytorch_model.safetensors",)])
def test_beside_other_weights_it_is_not_taken_for_the_base(copy: Path, others: tuple[str, ...]) -> None:
    """Which of two files is meant is not guessed, nor is a part's own file passed over."""
    for name in others:
        save_file({"w": torch.zeros(1)}, copy / name)
    assert checkpoint_in(copy) is None
    assert "no file named" in refusal(copy)


def test_a_flux_is_not_loaded_from_one_file(bases: Path, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(bases / "flux-dev", tmp_path / "flux", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    save_file({"w": torch.zeros(1)}, folder / "flux1-dev.safetensors")
    with pytest.raises(
        BaseModelError, match=rf"^The base in {re.escape(str(folder))} cannot be loaded as flux: .*no file"
    ):
        load_model("flux", folder, CPU)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_refused_in_a_sentence(folders: tuple[Path, Path], kind: str) -> None:
    with pytest.raises(BaseModelError) as error:
        load_model("sdxl", folders[1], CPU, quantized=kind)
    assert str(error.value) == (
        f"The base in {folders[1]} cannot be loaded as sdxl: {FILE} is one file, which cannot be {kind}. "
        "Expected bf16 or fp32."
    )


# From the hub to an image.


@pytest.fixture
def server(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The two repositories, as far as is known: the authors' with their file, SDXL's with its small files and weights.
    Whatever asks the hub without being told where it is comes here, too."""
    diffusers_format, single = folders
    base = BASES["illustrious-xl"]
    with serving() as server:
        server.hub.publish(*base.sources)
        files = {str(path.relative_to(diffusers_format)): path.read_bytes() for path in diffusers_format.rglob("*.*")}
        halves = {name.replace(".safetensors", ".fp16.safetensors"): b"sdxl's own" for name in files}
        server.hub.others = {
            base.repository: {FILE: (single / FILE).read_bytes(), "README.md": b"read me"},
            base.sources[1].repository: halves | files | {"sd_xl_base_1.0.safetensors": b"sdxl's own"},
        }
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_illustrious_xl_is_fetched_and_loaded_without_asking_again(
    server: Server, folders: tuple[Path, Path], models: tuple[Family, Family], tmp_path: Path
) -> None:
    base = BASES["illustrious-xl"]
    folder = ensure_base("illustrious-xl", base, tmp_path, endpoint=server.address)
    assert contents(folder) == contents(folders[1])
    server.hub.asked.clear()
    model = load_model("sdxl", folder, CPU)
    request = Request("a photo of a dog", seed=3, num_inference_steps=2)
    images = [np.asarray(generate(one, request)[0]) for one in (models[0], model)]
    assert np.array_equal(*images)
    assert server.hub.asked == []
