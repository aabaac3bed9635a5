"""Bounds, sizes and conflicts of a request; what an upload turns into; one list of fields in three places."""

import inspect
import math
import struct
import typing
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import cog
import numpy as np
import pytest
import typer
from PIL import Image, ImageOps

import predict
from klora import cli
from klora.errors import RequestError
from klora.form.request import Request, open_image

WHOLE = {
    "width": (64, 2048), "height": (64, 2048), "num_outputs": (1, 4), "num_inference_steps": (1, 500),
    "seed": (0, 4294967295), "output_quality": (0, 100),
}  # fmt: skip
FLOATS = {
    "content_scale": (-1, 3), "style_scale": (-1, 3), "style_bias": (0, 10), "alpha": (0, 10), "beta": (0, 10),
    "prompt_strength": (0, 1), "guidance_scale": (0, 50),
}  # fmt: skip
RATIOS = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216),
    "4:5": (896, 1088), "5:4": (1088, 896), "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344),
    "9:21": (640, 1536),
}  # fmt: skip
CHOICES = {
    "model": ["sdxl", "illustrious-xl", "flux-dev", "flux-schnell"],
    "fusion": ["klora", "sum", "content", "style"],
    "pattern": ["auto", "s", "s*"],
    "aspect_ratio": [*RATIOS, "custom", "match_input_image"],
    "megapixels": ["0.25", "0.5", "1", "2"],
    "scheduler": ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM"],
    "output_format": ["webp", "jpg", "png"],
}
PICTURE = Image.new("RGB", (300, 100))


def request(**given: Any) -> Request:
    return Request(**{"prompt": "a dog", **given})


def refusal(**given: Any) -> str:
    with pytest.raises(RequestError) as error:
        request(**given)
    return str(error.value)


# Bounds and choices.


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (low, high) in WHOLE.items() for value in (low - 1, high + 1)]
    + [(name, math.nextafter(low, -math.inf)) for name, (low, _) in FLOATS.items()]
    + [(name, math.nextafter(high, math.inf)) for name, (_, high) in FLOATS.items()]
    + [(name, value) for name in FLOATS for value in (math.nan, math.inf, -math.inf)],
)
def test_a_number_outside_its_bounds_is_refused_in_one_sentence(name: str, value: float) -> None:
    low, high = (WHOLE | FLOATS)[name]
    assert refusal(**{name: value}) == f"{name} is {value}. Expected {low} to {high}."


@pytest.mark.parametrize(("name", "bounds"), (WHOLE | FLOATS).items())
def test_both_bounds_are_accepted(name: str, bounds: tuple[float, float]) -> None:
    assert [getattr(request(**{name: value}), name) for value in bounds] == [*bounds]


@pytest.mark.parametrize(("name", "choices"), CHOICES.items())
@pytest.mark.parametrize("wrong", ["", "nope", " png", "KLORA", "1.0"])
def test_a_choice_that_is_not_listed_is_refused_in_one_sentence(name: str, choices: list[str], wrong: str) -> None:
    assert refusal(**{name: wrong}) == f"{name} is {wrong!r}. Expected one of {', '.join(choices)}."


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in CHOICES for choice in CHOICES[name]])
def test_every_listed_choice_is_accepted(name: str, choice: str) -> None:
    needed = {"custom": {"width": 64}, "match_input_image": {"image": PICTURE}}.get(choice, {})
    assert getattr(request(**{name: choice, **needed}), name) == choice


def test_no_bound_and_no_choice_is_missing_above() -> None:
    bounded = {
        item.name: (item.metadata["ge"], item.metadata["le"]) for item in fields(Request) if "ge" in item.metadata
    }
    chosen = {item.name: list(item.metadata["choices"]) for item in fields(Request) if "choices" in item.metadata}
    assert (bounded, chosen) == (WHOLE | FLOATS, CHOICES)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_a_blank_prompt_is_refused(prompt: str) -> None:
    assert refusal(prompt=prompt) == "prompt is empty. Expected what the image shows."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 512, "aspect_ratio": "16:9"}, "width or height is given with aspect_ratio 16:9. Expected custom."),
        (
            {"height": 512, "aspect_ratio": "match_input_image", "image": PICTURE},
            "width or height is given with aspect_ratio match_input_image. Expected custom.",
        ),
        ({"aspect_ratio": "custom"}, "aspect_ratio is custom but neither width nor height is given. Give one or both."),
        (
            {"aspect_ratio": "match_input_image"},
            "aspect_ratio is match_input_image but image is not given. Give it, or a ratio.",
        ),
        ({"mask": PICTURE}, "mask is given without image. Expected the image to repaint, too."),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    assert refusal(**given) == message


# Sizes.


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("multiple", [8, 16])
def test_one_megapixel_has_the_sides_that_flux_on_replicate_makes(ratio: str, multiple: int) -> None:
    assert request(aspect_ratio=ratio).size(1024, multiple) == RATIOS[ratio]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("multiple", [8, 16])
def test_a_quarter_megapixel_halves_both_sides(ratio: str, multiple: int) -> None:
    assert request(aspect_ratio=ratio, megapixels="0.25").size(1024, multiple) == tuple(
        side // 2 for side in RATIOS[ratio]
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("megapixels", CHOICES["megapixels"])
@pytest.mark.parametrize(("native", "multiple"), [(1024, 8), (1024, 16), (512, 8), (64, 8), (64, 16)])
def test_any_size_is_of_whole_multiples_nearest_to_ratio_and_area(
    ratio: str, megapixels: str, native: int, multiple: int
) -> None:
    size = request(aspect_ratio=ratio, megapixels=megapixels).size(native, multiple)
    exact = [side * native / 1024 * float(megapixels) ** 0.5 for side in RATIOS[ratio]]
    assert [side % multiple for side in size] == [0, 0]
    assert all(side > 0 for side in size)
    assert all(abs(side - wanted) <= multiple / 2 for side, wanted in zip(size, exact, strict=True))


def test_without_ratio_sides_or_image_the_size_is_the_bases_own() -> None:
    assert request().size(64, 8) == (64, 64)


@pytest.mark.parametrize("aspect_ratio", [None, "custom"])
@pytest.mark.parametrize(
    ("sides", "size"),
    [({"width": 640}, (640, 512)), ({"height": 640}, (512, 640)), ({"width": 100, "height": 2048}, (100, 2048))],
)
def test_a_side_that_is_named_is_kept_and_the_other_is_the_bases_own(
    aspect_ratio: str | None, sides: dict[str, int], size: tuple[int, int]
) -> None:
    asked = request(aspect_ratio=aspect_ratio, megapixels="0.25", image=PICTURE, **sides)
    assert asked.size(512, 16) == size


@pytest.mark.parametrize("aspect_ratio", [None, "match_input_image"])
def test_an_image_gives_its_shape_to_the_bases_own_area(aspect_ratio: str | None) -> None:
    asked = request(aspect_ratio=aspect_ratio, image=PICTURE)
    assert asked.size(1024, 8) == (1776, 592)
    assert asked.size(64, 8) == (112, 40)


def test_an_images_shape_is_scaled_by_megapixels_and_yields_to_a_ratio() -> None:
    assert request(image=PICTURE, megapixels="0.25").size(1024, 8) == (888, 296)
    assert request(image=PICTURE, aspect_ratio="4:3").size(1024, 8) == RATIOS["4:3"]


@pytest.mark.parametrize("sides", [(1, 1_000_000), (1_000_000, 1), (100, 401), (401, 100)])
def test_an_image_too_thin_to_draw_is_refused_unless_a_ratio_is_named(sides: tuple[int, int]) -> None:
    image = Image.new("1", sides)
    with pytest.raises(RequestError, match=rf"^image is {sides[0]}x{sides[1]}\. Expected sides of at most 4 to 1\.$"):
        request(image=image).size(1024, 16)
    assert request(image=image, aspect_ratio="1:1").size(1024, 16) == (1024, 1024)


def test_an_image_of_four_to_one_is_as_thin_as_may_be() -> None:
    assert request(image=Image.new("1", (400, 100))).size(1024, 16) == (2048, 512)


# Seeds.


def test_a_seed_is_drawn_anew_for_each_request_unless_given() -> None:
    seeds = {request().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request(seed=0).seed == 0


# Uploads.


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int) -> bytes:
    """A PNG of 41 bytes that declares this size and ends where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT"


def upload_refusal(path: Path, mode: str = "RGB") -> str:
    with pytest.raises(RequestError) as error:
        open_image("mask", path, mode)
    return str(error.value)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_270),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_an_upload_is_turned_as_its_exif_says(tmp_path: Path, orientation: int, turn: Image.Transpose | None) -> None:
    stored = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image("image", save(tmp_path / "photo.png", stored, exif=exif), "RGB")
    assert np.array_equal(opened, stored if turn is None else stored.transpose(turn))


RED = (255, 0, 0)
STORED = {
    "RGB": Image.new("RGB", (4, 4), RED),
    "palette": Image.new("RGB", (4, 4), RED).quantize(8),
    "alpha": Image.new("RGBA", (4, 4), (*RED, 255)),
    "bits": Image.new("1", (4, 4), 1),
    "grey": Image.new("L", (4, 4), 200),
    "grey and alpha": Image.new("LA", (4, 4), (200, 255)),
}
SEEN = {"bits": (255, 255, 255), "grey": (200, 200, 200), "grey and alpha": (200, 200, 200)}


@pytest.mark.parametrize("kind", STORED)
def test_every_kind_of_pixel_becomes_rgb_or_grey(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "image.png", STORED[kind])
    rgb, grey = open_image("image", path, "RGB"), open_image("mask", path, "L")
    assert (rgb.mode, rgb.getpixel((1, 1))) == ("RGB", SEEN.get(kind, RED))
    assert grey.mode == "L"
    assert grey.getpixel((1, 1)) == ImageOps.grayscale(rgb).getpixel((1, 1))


def test_print_colours_become_rgb(tmp_path: Path) -> None:
    path = save(tmp_path / "image.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert np.abs(np.asarray(open_image("image", path, "RGB"), int) - RED).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "mpo"])
def test_what_cameras_and_programs_write_is_opened(tmp_path: Path, suffix: str) -> None:
    opened = open_image("image", save(tmp_path / f"image.{suffix}", Image.new("RGB", (16, 8), (200, 100, 50))), "RGB")
    assert opened.size == (16, 8)
    assert np.abs(np.asarray(opened, int) - (200, 100, 50)).max() <= 4  # what jpg and webp lose


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.uint16([[0, 0x8000, 0xFFFF]]))
    opened = np.asarray(open_image("image", save(tmp_path / "deep.png", grey), mode), int)
    assert opened.reshape(3, -1)[:, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"image.{suffix}", Image.fromarray(noise))
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG or WebP file."


@pytest.mark.parametrize(
    "text",
    [
        "just words",
        "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "P6 is what this note begins with",
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8",
    ],
)
def test_a_text_file_is_refused_whatever_it_is_called(tmp_path: Path, text: str) -> None:
    path = tmp_path / "image.png"
    path.write_text(text)
    assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG or WebP file."


@pytest.mark.parametrize("name", ["no-such-file.png", "."])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    assert upload_refusal(tmp_path / name).startswith("mask cannot be read as an image.")


def test_a_size_that_is_only_declared_is_enough_to_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(8192, 8193))
    assert upload_refusal(path) == "mask has 8192x8193 pixels. Expected at most 67108864."
    path.write_bytes(png(8192, 8192))
    assert upload_refusal(path) == "mask cannot be read as an image. Expected a PNG, JPEG or WebP file."
    path.write_bytes(png(65535, 65535))
    assert upload_refusal(path).startswith("mask ")


# One list of fields in three places.


FORM: Mapping[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(predict.Predictor.predict).parameters.items()
    if name != "self"
}
OPTIONS = {option.name: option for option in typer.main.get_command(cli.app).commands["fuse"].params}
OWN_DEFAULT = {"content_scale", "style_scale", "seed"}  # the form leaves them blank, so that an old name may fill them


def test_the_form_has_the_fields_of_a_request_in_its_order() -> None:
    others = {*predict.ALIASES, *predict.TOKENS, "prompts"}  # a file of requests
    ours = [name for name in FORM if name not in others]
    assert ours == [item.name for item in fields(Request)]


@pytest.mark.parametrize("name", [item.name for item in fields(Request)])
def test_the_form_has_a_requests_bounds_choices_default_and_type(name: str) -> None:
    item = next(item for item in fields(Request) if item.name == name)
    form, kind = FORM[name], get_type_hints(Request)[name]
    assert (form.ge, form.le) == (item.metadata.get("ge"), item.metadata.get("le"))
    assert form.choices == (list(item.metadata["choices"]) if "choices" in item.metadata else None)
    assert form.default == (None if name in OWN_DEFAULT or item.default is MISSING else item.default)
    kind = typing.Optional[kind] if name in OWN_DEFAULT else kind  # noqa: UP045
    form_kind = get_type_hints(predict.Predictor.predict)[name]
    assert form_kind == (cog.Path | None if kind == Image.Image | None else kind)


@pytest.mark.parametrize(("alias", "name"), predict.ALIASES.items())
def test_an_old_name_is_deprecated_and_bounded_as_the_new_one(alias: str, name: str) -> None:
    old, new = FORM[alias], FORM[name]
    assert (old.ge, old.le, old.choices, old.default, old.deprecated) == (new.ge, new.le, new.choices, None, True)
    hints = get_type_hints(predict.Predictor.predict)
    assert hints[alias] == hints[name]


def test_every_token_of_the_form_is_a_secret() -> None:
    hints = get_type_hints(predict.Predictor.predict)
    assert {name for name in FORM if hints[name] == cog.Secret | None} == set(predict.TOKENS)


def test_the_command_has_the_fields_of_a_request_in_its_order() -> None:
    assert [*OPTIONS] == [*(item.name for item in fields(Request)), "out"]


@pytest.mark.parametrize("name", [item.name for item in fields(Request)])
def test_the_command_has_a_requests_bounds_choices_and_default(name: str) -> None:
    item = next(item for item in fields(Request) if item.name == name)
    option = OPTIONS[name]
    if "ge" in item.metadata:
        assert (option.min, option.max) == (item.metadata["ge"], item.metadata["le"])
    if "choices" in item.metadata:
        assert get_args(option.type_descriptor.annotation) == item.metadata["choices"]
    assert option.default == (None if item.default is MISSING else item.default)
    assert option.help == item.metadata["help"]
    assert option.required == (name == "prompt")
