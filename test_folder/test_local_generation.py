"""The studio: it chooses a base, refuses what does not fit, fails closed, and remembers nothing but loaded bases."""

import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import weights
from klora.errors import BaseModelError, KLoRAError, LoRAError, RequestError, SafetyError
from klora.form.request import Request
from klora.generation import generate
from klora.layers import HEADROOM_BYTES
from klora.models.safety import SafetyChecker
from klora.studio import Studio, save_images
from test_folder import tiny

CPU = torch.device("cpu")
PLENTY = 1 << 40
FIRST = {"sdxl": "sdxl", "flux": "flux-dev"}  # the base that each family's LoRAs choose
NAMES = {"sdxl": "SDXL", "flux": "FLUX.1"}
COMPONENT = {"sdxl": "unet", "flux": "transformer"}
OTHER = {"sdxl": "flux", "flux": "sdxl"}

Images = dict[int, np.ndarray]


@pytest.fixture(scope="module")
def loras(loras: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """conftest's LoRAs, for every base of their family, SDXL's style with layers of the first text encoder, too."""
    folder = tmp_path_factory.mktemp("loras")
    for file in loras.iterdir():
        every = {key: tensor for key, tensor in load_file(file).items() if "guidance_embedder" not in key}
        save_file(every, folder / file.name)  # schnell has no guidance
    shapes = tiny.linear_shapes(CLIPTextModel.from_pretrained(bases / "sdxl" / "text_encoder"))
    encoder = tiny.save_lora(folder / "encoder.safetensors", tiny.random_lora(shapes, seed=3), prefix="text_encoder")
    style = folder / "sdxl_style.safetensors"
    save_file(load_file(style) | load_file(encoder), style)
    return folder


@pytest.fixture(scope="module")
def models(bases: Path) -> Iterator[Path]:
    """The tiny bases, as those that are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KLORA_MODELS", str(bases))
        yield bases


def open_studio(checker: Path, free: Callable[[torch.device], int] = lambda device: PLENTY) -> Studio:
    return Studio(weights.find_base, checker, CPU, free)


@pytest.fixture
def fresh(models: Path) -> Studio:
    """A studio that has done nothing yet."""
    return open_studio(models / "safety-checker")


@pytest.fixture(scope="module")
def studio(models: Path) -> Studio:
    """One studio for all tests that do not look into it: what it did before must not matter."""
    return open_studio(models / "safety-checker")


@pytest.fixture(scope="module")
def first(studio: Studio, loras: Path) -> dict[str, Images]:
    """What it drew when it was new, by family."""
    return {family: made(studio, request(), pair(loras, family)) for family in FIRST}


def request(**given: Any) -> Request:
    quick = {"prompt": "a photo of a dog", "num_inference_steps": 3, "seed": 7, "disable_safety_checker": True}
    return Request(**{**quick, **given})


def pair(loras: Path, family: str) -> dict[str, Path]:
    return {f"{role}_lora": loras / f"{family}_{role}.safetensors" for role in ("content", "style")}


def made(studio: Studio, asked: Request, files: Mapping[str, Path], **options: Any) -> Images:
    return {index: np.asarray(image) for index, image in studio.make(asked, files, **options).items()}


def same(first: Images, second: Images) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[index], second[index]) for index in first)


# The base.


@pytest.mark.parametrize("base", ["sdxl", "illustrious-xl", "flux-dev", "flux-schnell"])
def test_every_base_makes_the_images_that_generate_makes(studio: Studio, loras: Path, base: str) -> None:
    files, asked = pair(loras, weights.BASES[base].family), request(model=base, num_outputs=2)
    model = studio.load(*weights.find_base(base))
    content, style = (model.read_lora(path) for path in files.values())
    expected = generate(model, asked, content=content, style=style)
    assert same(made(studio, asked, files), {index: np.asarray(image) for index, image in enumerate(expected)})
    assert not same(made(studio, asked, {}), made(studio, asked, files))


def test_layers_of_a_text_encoder_act_at_their_loras_scale(studio: Studio, loras: Path) -> None:
    def draw(**given: Any) -> Images:
        files = {"style_lora": loras / "encoder.safetensors"} if given else {}
        return made(studio, request(model="sdxl", **given), files)

    assert not same(draw(style_scale=1.0), draw())
    assert not same(draw(style_scale=1.0), draw(style_scale=2.0))
    assert same(draw(style_scale=0.0), draw())


def test_a_prompt_is_read_once_unless_a_lora_has_a_say_in_it(fresh: Studio, loras: Path) -> None:
    encoder, passes = fresh.load(*weights.find_base("sdxl")).text_encoders["text_encoder"], [0]
    encoder.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def passes_of(files: Mapping[str, Path], **given: Any) -> int:
        passes[0] = 0
        made(fresh, request(model="sdxl", **given), files)
        return passes[0]

    plain = {"content_lora": loras / "sdxl_content.safetensors"}
    assert passes_of(plain, negative_prompt="rain") == 2
    assert passes_of({}, negative_prompt="rain", seed=8) == passes_of(plain, negative_prompt="rain") == 0
    assert passes_of(plain, negative_prompt="snow") == 2
    assert passes_of(plain, prompt="a photo of a cat", negative_prompt="rain") == 2
    assert passes_of(plain) == 1
    assert passes_of(plain | {"style_lora": loras / "encoder.safetensors"}, negative_prompt="rain") == 2


@pytest.mark.parametrize("fusion", ["klora", "sum", "content", "style"])
def test_whole_numbers_serve_as_scales(studio: Studio, loras: Path, fusion: str) -> None:
    files = pair(loras, "sdxl")
    whole = made(studio, request(fusion=fusion, content_scale=1, style_scale=2), files)
    assert same(whole, made(studio, request(fusion=fusion, content_scale=1.0, style_scale=2.0), files))


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("roles", [("content_lora",), ("style_lora",), ("content_lora", "style_lora")])
def test_without_a_model_the_loras_choose_the_base(
    studio: Studio, loras: Path, family: str, roles: tuple[str, ...]
) -> None:
    studio.load(*weights.find_base(FIRST[OTHER[family]]))
    studio.make(request(), {role: pair(loras, family)[role] for role in roles})
    assert studio.resident[-1] == FIRST[family]


def test_without_model_and_loras_the_first_installed_base_is_taken(fresh: Studio) -> None:
    fresh.make(request(), {})
    assert fresh.resident == ["sdxl"]


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("role", ["content_lora", "style_lora"])
def test_a_lora_of_the_other_family_is_refused_naming_the_input_and_both_families(
    fresh: Studio, loras: Path, family: str, role: str
) -> None:
    with pytest.raises(LoRAError) as error:
        fresh.make(request(model=FIRST[family]), {role: pair(loras, OTHER[family])[role]})
    assert str(error.value) == (
        f"{role} was made for {NAMES[OTHER[family]]}, but this request runs {FIRST[family]}. "
        f"Expected one for {NAMES[family]}."
    )
    assert fresh.resident == []


@pytest.mark.parametrize("family", FIRST)
def test_two_loras_of_different_families_are_refused(fresh: Studio, loras: Path, family: str) -> None:
    files = {
        "content_lora": pair(loras, family)["content_lora"],
        "style_lora": pair(loras, OTHER[family])["style_lora"],
    }
    with pytest.raises(LoRAError) as error:
        fresh.make(request(), files)
    assert str(error.value) == (
        f"style_lora was made for {NAMES[OTHER[family]]}, but this request runs {FIRST[family]}. "
        f"Expected one for {NAMES[family]}."
    )


def test_a_family_without_an_installed_base_is_refused(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdxl").symlink_to(bases / "sdxl")
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"^A base model for flux LoRAs is not installed: \S+ has sdxl\. "):
        open_studio(tmp_path).make(request(), pair(loras, "flux"))


def test_a_lora_that_does_not_fit_the_base_is_refused_naming_the_input(
    studio: Studio, loras: Path, tmp_path: Path
) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = tiny.save_lora(tmp_path / "wide.safetensors", tiny.random_lora({name: (48, 48)}, seed=0))
    with pytest.raises(LoRAError, match=r"^style_lora: wide\.safetensors was made for another base: "):
        studio.make(request(), {"content_lora": loras / "sdxl_content.safetensors", "style_lora": wide})


def test_a_file_that_is_no_lora_is_refused_naming_the_input(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("no tensors here")
    with pytest.raises(LoRAError, match=r"style_lora.*notes\.safetensors"):
        studio.make(request(), {"style_lora": tmp_path / "notes.safetensors"})


# Memory.


def room_for(count: int, checker: Path) -> Studio:
    """A studio whose accelerator is full as soon as it holds so many bases."""
    studio = open_studio(checker, lambda device: PLENTY if len(studio.resident) < count else HEADROOM_BYTES)
    return studio


def test_the_base_used_least_recently_leaves_when_memory_is_short(models: Path) -> None:
    studio = room_for(2, models / "safety-checker")
    for name, expected in (
        ("sdxl", ["sdxl"]),
        ("flux-dev", ["sdxl", "flux-dev"]),
        ("sdxl", ["flux-dev", "sdxl"]),
        ("illustrious-xl", ["sdxl", "illustrious-xl"]),
        ("flux-schnell", ["illustrious-xl", "flux-schnell"]),
    ):
        studio.load(*weights.find_base(name))
        assert studio.resident == expected


def test_a_base_that_leaves_is_gone_from_memory(models: Path) -> None:
    studio = room_for(1, models / "safety-checker")
    denoiser = weakref.ref(studio.load(*weights.find_base("sdxl")).denoiser)
    studio.make(request(model="sdxl"), {})
    assert denoiser() is not None
    studio.load(*weights.find_base("flux-dev"))
    assert denoiser() is None


@pytest.mark.parametrize("family", FIRST)
def test_a_base_that_left_comes_back_on_demand_and_draws_the_same(models: Path, family: str) -> None:
    studio, base, other = room_for(1, models / "safety-checker"), FIRST[family], FIRST[OTHER[family]]
    before = made(studio, request(model=base), {})
    studio.make(request(model=other), {})
    assert studio.resident == [other]
    assert same(made(studio, request(model=base), {}), before)
    assert studio.resident == [base]


@pytest.mark.parametrize(("missing", "resident"), [(0, ["sdxl", "flux-dev"]), (1, ["flux-dev"])])
def test_a_base_leaves_when_one_byte_is_missing_for_the_next(models: Path, missing: int, resident: list[str]) -> None:
    needed = sum(file.stat().st_size for file in (models / "flux-dev").glob("*/*.safetensors"))
    studio = open_studio(models, lambda device: needed + HEADROOM_BYTES - missing)
    for name in ("sdxl", "flux-dev"):
        studio.load(*weights.find_base(name))
    assert studio.resident == resident


@pytest.mark.parametrize(("missing", "resident"), [(0, ["flux-dev", "both"]), (1, ["both"])])
def test_of_two_variants_only_the_one_that_is_loaded_counts(
    models: Path, tmp_path: Path, missing: int, resident: list[str]
) -> None:
    both = Path(shutil.copytree(models / "sdxl", tmp_path / "both"))
    files = list(both.glob("*/*.safetensors"))
    for file in files:
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    needed = sum(file.stat().st_size for file in files)
    studio = open_studio(models, lambda device: needed + HEADROOM_BYTES - missing)
    studio.load(*weights.find_base("flux-dev"))
    studio.load("both", "sdxl", both)
    assert studio.resident == resident


def without(part: str) -> Callable[[Path], object]:
    return lambda base: shutil.rmtree(base / part)


def cut(file: str) -> Callable[[Path], object]:
    return lambda base: (base / file).write_bytes((base / file).read_bytes()[:-1000])


def lacking(file: str, *names: str) -> Callable[[Path], object]:
    """Take tensors out of a file; without names, the first by name."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        for name in names or sorted(tensors)[:1]:
            del tensors[name]
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("unet"), id="no unet"),
        pytest.param(cut(UNET), id="unet cut short"),
        pytest.param(lambda base: (base / "model_index.json").write_text("{"), id="no index"),
        pytest.param(cut(TEXT), id="text encoder cut short"),
        pytest.param(lacking(UNET), id="unet lacks a tensor"),
        pytest.param(without("tokenizer"), id="no tokenizer"),
        pytest.param(lacking(TEXT), id="text encoder lacks a tensor"),
    ],
)
def test_a_damaged_base_is_refused_and_the_others_stay(
    studio: Studio,
    first: dict[str, Images],
    models: Path,
    loras: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
) -> None:
    resident = studio.resident
    damage(damaged := Path(shutil.copytree(models / "sdxl", tmp_path / "damaged")))
    with pytest.raises(BaseModelError, match=r"/damaged "):
        studio.load(str(tmp_path), "sdxl", damaged)
    assert studio.resident == resident
    assert same(made(studio, request(), pair(loras, "sdxl")), first["sdxl"])


# Safety.


def unsafe(studio: Studio, asked: Request) -> str:
    """The refusal of a request that must not begin to denoise."""
    steps: list[int] = []
    with pytest.raises(SafetyError) as error:
        studio.make(asked, {}, on_step=lambda step, _: steps.append(step))
    assert (steps, studio.resident) == ([], [])
    return str(error.value)


def checked(**given: Any) -> Request:
    return request(disable_safety_checker=False, **given)


def test_a_missing_checker_refuses_before_denoising_until_it_is_installed(models: Path, tmp_path: Path) -> None:
    studio = open_studio(tmp_path / "checker")
    assert unsafe(studio, checked()) == (
        "The safety checker is not installed. "
        "Install the safety-checker folder beside the base models, or set disable_safety_checker=true."
    )
    tiny.build_safety_checker(tmp_path / "checker")
    assert studio.make(checked(), {}).keys() == {0}


WEIGHTS = "model.safetensors"
THRESHOLDS = ("concept_embeds_weights", "special_care_embeds_weights")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / WEIGHTS).unlink(), id="no weights"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), id="no config"),
        pytest.param(lambda folder: (folder / "preprocessor_config.json").unlink(), id="no processor"),
        pytest.param(cut(WEIGHTS), id="cut short"),
        pytest.param(lacking(WEIGHTS, *THRESHOLDS), id="no thresholds"),
        pytest.param(lacking(WEIGHTS, "visual_projection.weight"), id="no projection"),
    ],
)
def test_a_damaged_checker_refuses_before_denoising(
    models: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(folder := tiny.build_safety_checker(tmp_path / "checker", flags=True))
    message = unsafe(open_studio(folder), checked())
    assert message.startswith("The safety checker ")
    assert message.endswith("or set disable_safety_checker=true.")


def test_a_checker_that_computes_nan_shows_nothing(models: Path, tmp_path: Path) -> None:
    folder = tiny.build_safety_checker(tmp_path / "checker", flags=True)
    tensors = load_file(folder / WEIGHTS)
    tensors["visual_projection.weight"].fill_(torch.nan)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SafetyError):
        open_studio(folder).make(checked(), {})


def test_when_every_image_is_flagged_the_error_names_them(models: Path, tmp_path: Path) -> None:
    studio = open_studio(tiny.build_safety_checker(tmp_path / "checker", flags=True))
    with pytest.raises(SafetyError) as error:
        studio.make(checked(num_outputs=2), {})
    assert str(error.value) == (
        "The safety checker withheld every image (0, 1). "
        "Try another prompt or seed, or set disable_safety_checker=true."
    )


def test_without_the_check_no_checker_is_needed_and_nothing_is_withheld(models: Path, tmp_path: Path) -> None:
    flagging = open_studio(tiny.build_safety_checker(tmp_path / "checker", flags=True))
    missing = open_studio(tmp_path / "nothing")
    assert same(made(flagging, request(num_outputs=2), {}), made(missing, request(num_outputs=2), {}))


@pytest.mark.parametrize("family", FIRST)
def test_images_that_pass_the_check_are_not_touched_by_it(studio: Studio, loras: Path, family: str) -> None:
    files = pair(loras, family)
    assert same(made(studio, checked(num_outputs=2), files), made(studio, request(num_outputs=2), files))


def build_checker_of(image: Image.Image, images: list[Image.Image], folder: Path) -> Path:
    """A checker whose one concept is what sets this image apart from the others, its threshold half-way to the next."""
    checker = SafetyChecker.load(tiny.build_safety_checker(folder), CPU)
    with torch.no_grad():
        pixels = checker.processor(images, return_tensors="pt").pixel_values
        embeds = checker.model.visual_projection(checker.model.vision_model(pixels)[1])
        embeds = torch.nn.functional.normalize(embeds)
        own = embeds[images.index(image)]
        concept = torch.nn.functional.normalize(own - embeds.mean(0), dim=0)
        likeness = (embeds @ concept).sort().values
        assert likeness[-1] - likeness[-2] > 0.005  # the checker rounds to 0.001
        checker.model.concept_embeds[0] = concept
        checker.model.concept_embeds_weights[0] = likeness[-2:].mean()
    checker.model.save_pretrained(folder)
    return folder


def test_only_flagged_images_are_withheld_and_the_others_keep_their_place(
    studio: Studio, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = checked(num_outputs=4, output_format="png")
    images = studio.make(batch, {})
    folder = build_checker_of(images[1], list(images.values()), tmp_path / "checker")
    shown = open_studio(folder).make(batch, {})
    assert [*shown] == [0, 2, 3]
    assert all(np.array_equal(shown[index], images[index]) for index in shown)
    assert [record.getMessage() for record in caplog.records if record.name == "klora.studio.studio"][-1] == (
        "The safety checker withheld these images of the batch: 1."
    )
    paths = save_images(shown, tmp_path / "out", batch)
    assert [path.name for path in paths] == ["klora_7_0.png", "klora_9_2.png", "klora_10_3.png"]


# Files.


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(("suffix", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_images_are_saved_in_the_format_of_their_name(tmp_path: Path, suffix: str, kind: str) -> None:
    paths = save_images({0: NOISE, 2: NOISE.copy()}, tmp_path / "new" / "folder", request(output_format=suffix))
    assert paths == [tmp_path / "new" / "folder" / f"klora_{name}.{suffix}" for name in ("7_0", "9_2")]
    assert [Image.open(path).format for path in paths] == [kind, kind]


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_quality_trades_size_for_likeness(tmp_path: Path, suffix: str) -> None:
    sizes, errors = [], []
    for quality in (0, 50, 80, 100):
        asked = request(output_format=suffix, output_quality=quality)
        path = save_images({0: NOISE}, tmp_path, asked)[0]
        sizes.append(path.stat().st_size)
        errors.append(np.abs(np.asarray(Image.open(path), int) - np.asarray(NOISE, int)).mean())
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


def test_png_is_exact_at_any_quality(tmp_path: Path) -> None:
    path = save_images({0: NOISE}, tmp_path, request(output_format="png", output_quality=0))[0]
    assert np.array_equal(Image.open(path), NOISE)


# One request after another.


@pytest.mark.parametrize("family", FIRST)
def test_progress_is_told_step_by_step(studio: Studio, loras: Path, family: str) -> None:
    told: list[tuple[int, int]] = []
    studio.make(request(), pair(loras, family), on_step=lambda *step: told.append(step))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


OWN = {"content_lora": "{family}_content.safetensors", "style_lora": "{family}_style.safetensors"}
FAILURES: dict[str, tuple[dict[str, Any], dict[str, str], type[KLoRAError]]] = {
    "wrong family": ({}, OWN | {"style_lora": "{other}_style.safetensors"}, LoRAError),
    "no such layer": ({}, OWN | {"style_lora": "strange.safetensors"}, LoRAError),
    "size": ({"width": 100, "height": 100}, OWN, RequestError),
    "no content": ({"fusion": "content"}, {"style_lora": OWN["style_lora"]}, RequestError),
}


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_refused_request_the_next_draws_as_at_first(
    studio: Studio, first: dict[str, Images], loras: Path, tmp_path: Path, family: str, failure: str
) -> None:
    folder = Path(shutil.copytree(loras, tmp_path / "loras"))
    strange = tiny.random_lora({"down_blocks.9.x" if family == "sdxl" else "single_blocks.9.x": (8, 8)}, seed=0)
    tiny.save_lora(folder / "strange.safetensors", strange, prefix=COMPONENT[family])
    given, files, error = FAILURES[failure]
    with pytest.raises(error):
        studio.make(
            request(model=FIRST[family], **given),
            {role: folder / file.format(family=family, other=OTHER[family]) for role, file in files.items()},
        )
    assert same(made(studio, request(), pair(loras, family)), first[family])


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("last", [0, 2, 3])
def test_after_an_interrupted_request_the_next_draws_as_at_first(
    studio: Studio, first: dict[str, Images], loras: Path, family: str, last: int
) -> None:
    def interrupt(step: int, _: int) -> None:
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.make(request(fusion="sum", seed=1, num_outputs=2), pair(loras, family), on_step=interrupt)
    assert same(made(studio, request(), pair(loras, family)), first[family])


PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
HALF = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 64, axis=0).repeat(32, axis=1))
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("sdxl", {}),
    ("flux", {}),
    ("sdxl", {"fusion": "sum", "scheduler": "DPMSolverMultistep"}),
    ("sdxl", {"fusion": "style", "scheduler": "K_EULER_ANCESTRAL", "num_outputs": 2}),
    ("flux", {"fusion": "content", "style_scale": 2}),
    ("sdxl", {"fusion": "content", "scheduler": "KarrasDPM"}),
    ("sdxl", {"pattern": "s", "style_bias": 3, "scheduler": "HeunDiscrete"}),
    ("sdxl", {"image": PICTURE, "scheduler": "PNDM"}),
    ("sdxl", {"image": PICTURE, "mask": HALF, "negative_prompt": "blurry"}),
    ("flux", {"image": PICTURE, "mask": HALF, "pattern": "s", "model": "flux-schnell"}),
    ("sdxl", {"model": "illustrious-xl", "width": 80}),
    ("sdxl", {"content_scale": -1, "scheduler": "DDIM", "num_inference_steps": 4}),
]


def test_what_was_asked_before_changes_nothing(studio: Studio, fresh: Studio, loras: Path) -> None:
    def draw(place: Studio, number: int) -> Images:
        family, given = REQUESTS[number]
        return made(place, request(**given), pair(loras, family))

    numbers = range(len(REQUESTS))
    forwards = [draw(fresh, number) for number in numbers]
    torch.rand(5)
    backwards = [draw(studio, number) for number in reversed(numbers)][::-1]
    assert all(map(same, forwards, backwards))
    assert not any(same(forwards[first], forwards[second]) for first in numbers for second in range(first))


@pytest.mark.parametrize("family", FIRST)
def test_a_request_draws_nothing_from_the_global_generators(studio: Studio, loras: Path, family: str) -> None:
    torch.manual_seed(5)
    studio.load(*weights.find_base(FIRST[family]))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    studio.make(request(num_outputs=2), pair(loras, family))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
