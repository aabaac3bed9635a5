"""`klora reproduce` makes an image again from its record, to the last bit, or tells what differs."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from klora.cache import Borrowed
from klora.form.request import Request
from klora.studio import Studio, save_images
from klora.studio.likeness import difference
from klora.studio.provenance import read_provenance
from test_folder.pairs import named_pair
from test_folder.provenance.commands import fuse, refusal, reproduce
from test_folder.provenance.records import digest, rewritten

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sdxl": ("png", named_pair("sdxl")),
    "flux": ("png", (*named_pair("flux"), "--go-fast", "--num-inference-steps", "6")),
    "one LoRA": ("webp", (*named_pair("sdxl")[:2], "--scheduler", "K_EULER_ANCESTRAL", "--content-scale", "2")),
    "none": ("jpg", ("--model", "illustrious-xl", "--width", "80", "--negative-prompt", "a cat")),
    "sum": ("png", (*named_pair("sdxl"), "--fusion", "sum", "--no-add-triggers")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_third_of_four_images_is_made_again_by_itself_to_the_last_bit(shop: Path, case: str) -> None:
    kind, options = CASES[case]
    fuse(*options, "--num-outputs", "4", "--output-format", kind)
    (shop / f"out/klora_9_2.{kind}").rename(shop / f"it.{kind}")
    result = reproduce(f"it.{kind}", "--out", "again")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"again/klora_9_2.{kind}\nthe same pixels as it.{kind}\n"
    assert [path.name for path in (shop / "again").iterdir()] == [f"klora_9_2.{kind}"]
    assert np.array_equal(pixels(f"again/klora_9_2.{kind}"), pixels(f"it.{kind}"))
    assert Path(f"again/klora_9_2.{kind}").read_bytes() == Path(f"it.{kind}").read_bytes()


def test_images_of_one_name_are_made_again_beside_each_other_and_the_original(shop: Path) -> None:
    for folder, prompt in (("one", "a dog"), ("two", "a cat")):
        fuse(*named_pair("sdxl"), "--output-format", "png", "--out", folder, "--negative-prompt", prompt)
    for _ in range(2):
        assert reproduce("one/klora_7_0.png").stdout.splitlines()[0] == "reproduced/klora_7_0.png"
        assert reproduce("two/klora_7_0.png").stdout.splitlines()[0] == "reproduced/klora_7_0-2.png"
    assert Path("reproduced/klora_7_0.png").read_bytes() == Path("one/klora_7_0.png").read_bytes()
    own = Path("one/klora_7_0.png")
    Path(rewritten(own, lambda told: told["versions"].update(klora="another"))).replace(own)
    before = own.read_bytes()
    assert reproduce(str(own), "--out", "one").stdout.splitlines()[0] == "one/klora_7_0-2.png"
    assert own.read_bytes() == before


def test_an_image_made_from_others_needs_them_again(shop: Path) -> None:
    NOISE.save("start.png")
    Image.linear_gradient("L").save("mask.png")
    Image.linear_gradient("L").rotate(90).save("other.png")
    fuse(*named_pair("sdxl"), "--output-format", "png", "--image", "start.png", "--mask", "mask.png")
    file = "out/klora_7_0.png"
    assert "start" not in repr(Image.open(file).info)
    assert refusal(file).startswith("The image was made with image ")
    assert refusal(file, "--image", "start.png").startswith("The image was made with mask ")
    assert refusal(file, "--image", "start.png", "--mask", "other.png").startswith("mask has pixels of sha256 ")
    NOISE.save("same.webp", lossless=True)
    result = reproduce(file, "--image", "same.webp", "--mask", "mask.png")
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.array_equal(pixels("reproduced/klora_7_0.png"), pixels(file))


@pytest.mark.parametrize("named", ["moved.safetensors", "odd: name#.safetensors", "loras/moved.safetensors"])
def test_of_a_lora_that_is_not_there_the_option_is_named_that_takes_it(shop: Path, named: str) -> None:
    """As one of a server's folder, or of another working folder."""
    Path("loras").mkdir()
    Path("sdxl_style.safetensors").rename(named)
    fuse("--style-lora", named, "--output-format", "png")
    moved = Path(named).rename("elsewhere.safetensors")
    file = "out/klora_7_0.png"
    assert refusal(file) == (
        f"style_lora was {named!r}, which is not in the working folder. "
        f"Give its file, of sha256 {digest(moved.read_bytes())}, by --style-lora."
    )
    result = reproduce(file, "--style-lora", "elsewhere.safetensors")
    assert result.stdout.splitlines()[-1] == "the same pixels as klora_7_0.png"


def test_a_lora_elsewhere_serves_under_the_words_that_its_page_had(shop: Path, studio: Studio) -> None:
    file = shop / "sdxl_style.safetensors"
    asked = Request("a dog", style_lora="civitai:9", num_inference_steps=2, seed=7, disable_safety_checker=True)
    asked = replace(asked, output_format="png")
    fetched = {"style_lora": Borrowed(file, shop / f"{digest(file.read_bytes())}.json", ("zork style", "sks"))}
    images = studio.make(asked, fetched)
    bare = studio.make(asked, {"style_lora": Borrowed(file)})
    assert not np.array_equal(images[0], bare[0])
    (told,) = save_images(images, shop / "out", asked)
    assert read_provenance(told).loras["style_lora"].trigger == "zork style"
    file.rename(shop / "moved.safetensors")
    result = reproduce(str(told), "--style-lora", "moved.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.array_equal(pixels("reproduced/klora_7_0.png"), images[0])


def test_a_word_that_an_image_was_made_without_is_not_added_to_it(shop: Path) -> None:
    """As of an image that was made before what its file states was known for a trigger."""
    save_file(load_file("sdxl_style.safetensors"), "stating.safetensors", {"ss_trigger": "zork"})
    fuse("--style-lora", "stating.safetensors", "--output-format", "png")
    image = Path("out/klora_7_0.png")
    assert read_provenance(image).loras["style_lora"].trigger == "zork"
    result = reproduce(rewritten(image, lambda told: told["loras"]["style_lora"].update(trigger="")))
    assert result.exit_code == 0 and result.stderr.startswith("Warning: its pixels differ")
    fuse("--style-lora", "stating.safetensors", "--output-format", "png", "--no-add-triggers", "--out", "bare")
    assert np.array_equal(pixels("reproduced/klora_7_0.png"), pixels("bare/klora_7_0.png"))


@pytest.mark.parametrize("options", [(*named_pair("sdxl"), "--fusion", "sum"), named_pair("sdxl")[2:]])
def test_of_an_earlier_image_what_had_no_effect_is_left_out(shop: Path, options: tuple[str, ...]) -> None:
    """Its record has it, and it would be refused now."""
    fuse(*options, "--output-format", "png")
    idle = {"pattern": "s", "style_bias": 3.0, "alpha": 1.0, "beta": 0.5}
    earlier = rewritten(Path("out/klora_7_0.png"), lambda told: told["inputs"].update(idle))
    result = reproduce(earlier)
    assert (result.exit_code, result.stdout) == (0, "reproduced/klora_7_0.png\nthe same pixels as other.png\n")
    assert not idle.keys() & read_provenance(Path("reproduced/klora_7_0.png")).inputs.keys()


def test_other_libraries_another_base_and_other_pixels_are_told(image: Path, bases: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["versions"]["torch"] = "1.0"
        told["sources"] = {"owner/sdxl": "c0ffee"}
        told["inputs"]["seed"] = 8

    result = reproduce(rewritten(image, change))
    most = np.abs(pixels("reproduced/klora_8_0.png").astype(int) - pixels(image)).max()
    assert (result.exit_code, result.stdout) == (0, "reproduced/klora_8_0.png\n")
    assert result.stderr.splitlines() == [
        f"Warning: torch was 1.0 and is {version('torch')}, so that the image may come out otherwise.",
        "Warning: owner/sdxl was c0ffee and is unknown, so that the image may come out otherwise.",
        f"Warning: its pixels differ from those of other.png by up to {most} of 255.",
    ]


def test_an_image_that_is_cut_off_is_made_again_all_the_same(image: Path) -> None:
    whole = image.read_bytes()
    image.write_bytes(whole[: whole.index(b"IDAT") + 100])
    result = reproduce(str(image), "--out", "again")
    said = f"Warning: {image.name} is damaged, so that the pixels cannot be compared.\n"
    assert (result.exit_code, result.stderr) == (0, said)
    assert Path(result.stdout.strip()).read_bytes() == whole


def test_an_image_that_was_made_smaller_since_is_told(image: Path) -> None:
    chunks = PngInfo()
    chunks.add_text("klora", Image.open(image).info["klora"])
    Image.open(image).resize((32, 32)).save("small.png", pnginfo=chunks)
    assert reproduce("small.png").stderr == "Warning: it is 64x64, and small.png is not.\n"


@pytest.mark.parametrize(("levels", "batched"), [(3, True), (4, False)])
def test_what_a_batch_rounds_is_told_from_more(tmp_path: Path, levels: int, batched: bool) -> None:
    files = [tmp_path / name for name in ("first.png", "second.png")]
    for file, grey in zip(files, (100, 100 - levels), strict=True):
        Image.new("L", (2, 2), grey).save(file)
    told = difference(*files)
    assert f"up to {levels} of 255" in told and ("drawn in a batch" in told) is batched
