"""An image tells how it was made, in every format and without a secret; `klora reproduce` makes it again from that."""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file as load
from safetensors.torch import save_file as save
from typer.testing import CliRunner, Result

import weights
from klora import cli
from klora.bases.install import ensure_base
from klora.bases.table import BASES
from klora.cache import Borrowed
from klora.errors import RequestError
from klora.files.shelf import Shelf
from klora.form.request import Request
from klora.studio import Studio, save_images
from klora.studio.provenance import (
    MAX_COMMENT_BYTES,
    MAX_XMP_BYTES,
    Provenance,
    UsedLoRA,
    read_provenance,
    settled,
    sources_of,
)
from test_folder.fakes import Storage
from test_folder.fakes.base_hub import serving
from test_folder.fakes.hub import Hub

FORMATS = ("png", "jpg", "webp")
QUICK = ("--num-inference-steps", "3", "--disable-safety-checker", "--seed", "7")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
SHA256 = "0123456789" + "a" * 54


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def made(folder: Path = Path("nowhere"), loras: Mapping[str, UsedLoRA] | None = None, **given: Any) -> Provenance:
    """Of a request that draws nothing."""
    asked = Request(**{"prompt": "a dog", "seed": 7, "model": "sdxl", **given})
    return Provenance.of(settled(asked, asked.model or "sdxl", 3, 7.5), folder, loras or {}, {})


def saved(told: Provenance, folder: Path, output_format: str) -> Path:
    """A small image that says so."""
    image = Image.new("RGB", (8, 8))
    image.info["provenance"] = told
    return save_images({0: image}, folder, Request("a dog", seed=7, output_format=output_format))[0]


def parameters(file: Path) -> str:
    """As viewers find them: PNG's text chunk, EXIF's UserComment, of which eight bytes name the encoding."""
    with Image.open(file) as image:
        if image.format == "PNG":
            return image.info["parameters"]
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


# What is written, and read back.


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_character_survives_in_prompts_of_ten_thousand(tmp_path: Path, output_format: str) -> None:
    """Downwards, so that no two halves of a character stand as one: nobody can send a prompt with such a pair."""
    for start in range(0, 0x110000, 10_000):
        prompt = "".join(map(chr, reversed(range(start, min(start + 10_000, 0x110000)))))
        told = made(prompt=prompt)
        file = saved(told, tmp_path, output_format)
        assert read_provenance(file) == told
        assert parameters(file).startswith(prompt.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(
    "prompt", ['say "hi",\nSteps: 9, </klora:made> &lt; \\n \\ud800 {}', "\r\n\t\0 é 😀", "<a>&amp;"]
)
def test_what_the_formats_use_themselves_is_not_mistaken(tmp_path: Path, output_format: str, prompt: str) -> None:
    told = made(prompt=prompt, negative_prompt=prompt)
    assert read_provenance(saved(told, tmp_path, output_format)) == told


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("begin", ["", "x"])  # in one of them the cut would fall between the halves of a character
def test_of_a_prompt_too_long_for_exif_people_read_the_beginning_and_all_numbers(
    tmp_path: Path, output_format: str, begin: str
) -> None:
    told = made(prompt=begin + "😀" * 15_900)
    file = saved(told, tmp_path, output_format)
    whole, seen = told.parameters((8, 8)), parameters(file)
    assert read_provenance(file) == told
    assert seen.rpartition("\n")[2] == whole.rpartition("\n")[2]
    assert whole.startswith(seen.rpartition("\n")[0]) and len(seen) > MAX_COMMENT_BYTES // 4
    assert (seen == whole) is (output_format == "png")


def test_a_jpeg_that_cannot_hold_the_record_is_saved_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = made(prompt="x" * MAX_XMP_BYTES)
    assert [read_provenance(saved(long, tmp_path, kind)) for kind in ("png", "webp")] == [long, long]
    assert not caplog.messages
    file = saved(long, tmp_path, "jpg")
    assert "a JPEG cannot hold it, png and webp can." in caplog.text
    with pytest.raises(RequestError, match="does not say how it was made"):
        read_provenance(file)


def test_the_parameters_are_those_that_viewers_read() -> None:
    """Stored: the prompts, and a last line of pairs, in which what has a separator in it is quoted."""
    loras = {
        "content_lora": UsedLoRA("hf:someone/dog", (SHA256,)),
        "style_lora": UsedLoRA("my, oil.safetensors", ("b" * 64,)),
    }
    told = replace(made(loras=loras, negative_prompt="blurry", scheduler="DDIM", num_outputs=4), place=2)
    version = told.versions["klora"]
    assert told.parameters((1344, 768)) == (
        "a dog\nNegative prompt: blurry\n"
        "Steps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 9, Size: 1344x768, Model: sdxl, "
        'Content LoRA: "hf:someone/dog", Style LoRA: "my, oil.safetensors", '
        f'Version: klora {version}, Hashes: {{"lora:dog": "0123456789", "lora:my, oil": "bbbbbbbbbb"}}'
    )


OTHERS = {
    "prompt": "a cat", "model": "flux-dev", "negative_prompt": "b", "content_scale": 0.5, "style_scale": -1.0,
    "fusion": "sum", "pattern": "s", "style_bias": 2.0, "alpha": 1.25, "beta": 0.1, "aspect_ratio": "16:9", "width": 80,
    "height": 96, "megapixels": "2", "prompt_strength": 0.3, "num_outputs": 3, "num_inference_steps": 9,
    "guidance_scale": 1.5, "scheduler": "PNDM", "seed": 0, "output_format": "png", "output_quality": 7,
    "add_triggers": False, "go_fast": True, "disable_safety_checker": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_input_is_told(tmp_path: Path, name: str) -> None:
    asked = Request(**{"prompt": "a dog", "seed": 7, "model": "sdxl", name: OTHERS[name]})
    assert getattr(asked, name) == OTHERS[name] != getattr(Request("a dog", seed=7, model="sdxl"), name)
    again = read_provenance(saved(made(**{name: OTHERS[name]}), tmp_path, "png")).request()
    assert again == settled(asked, str(asked.model), 3, 7.5)


def test_what_depended_on_the_base_or_on_defaults_is_told_outright() -> None:
    pair = {"content_lora": "a/b", "style_lora": "a/c"}
    known = made(**pair).inputs
    assert (known["num_inference_steps"], known["guidance_scale"]) == (3, 7.5)
    assert (known["pattern"], known["alpha"], known["beta"]) == ("s*", 1.5, 1.275)
    assert made(**pair, pattern="s").inputs["beta"] == 0.5
    assert made(**pair, guidance_scale=0).inputs["guidance_scale"] == 0
    assert "pattern" not in made(**pair, fusion="sum").inputs


def test_the_test_of_all_inputs_names_them_all() -> None:
    apart = {"content_lora", "style_lora", "image", "mask", "report", "compare", "sweep"}  # the last: test_sheets.py
    assert {item.name for item in fields(Request)} - apart == OTHERS.keys()


# Where LoRAs and bases came from.


@pytest.fixture
def settings(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bases, a cache of one's own, no login; a working folder, which it is."""
    return settled_in(tmp_path, bases, monkeypatch)


def settled_in(folder: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*weights.AUTHORITIES.values(), *weights.TOKENS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("KLORA_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    return folder / "work"


@pytest.fixture
def hub(settings: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(storage) as hub:
        hub.tokens_issued = {"hf_CANARYtoken"}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("KLORA_TRUSTED_HOSTS", storage.host)
        yield hub


@pytest.fixture(scope="module")
def studio(bases: Path) -> Studio:
    def find(name: str | None, family: str | None) -> tuple[str, str, Path]:
        return "sdxl", "sdxl", bases / "sdxl"

    return Studio(find, Path("no-checker"), torch.device("cpu"))


def drawn(
    studio: Studio, files: weights.LoRAFiles, folder: Path, tokens: Mapping[str, str] | None = None, **given: Any
) -> list[Path]:
    """As predict.py and the command do it."""
    asked = Request("a dog", num_inference_steps=2, seed=7, disable_safety_checker=True, **given)
    with files.borrowed(asked.loras, tokens or {}) as (paths, lent):
        images = studio.make(asked, paths, lent=lent)
    return save_images(images, folder, asked)


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_secret_of_a_request_is_in_its_images(
    studio: Studio, hub: Hub, storage: Storage, loras: Path, settings: Path, output_format: str
) -> None:
    content, style = ((loras / f"sdxl_{role}.safetensors").read_bytes() for role in ("content", "style"))
    hub.publish("o/m", {"x.safetensors": content}, readers={"hf_CANARYtoken"})
    encoded = base64.b64encode(style).decode()
    signed = storage.signed("/oil.safetensors", style)
    shutil.copy(loras / "sdxl_style.safetensors", settings / "oil.safetensors")
    secrets = ["hf_CANARYtoken", signed.partition("=")[2], encoded[:60], str(settings), str(settings.parent), "X-Amz"]
    tokens = {"hf": "hf_CANARYtoken", "civitai": "CANARYcivitai", "replicate": "CANARYreplicate"}
    shown = {
        signed: signed.partition("?")[0],
        f"data:application/octet-stream;base64,{encoded}": f"data:{digest(style)}",
        str(settings / "oil.safetensors"): "oil.safetensors",
        f"../{settings.name}/oil.safetensors": "oil.safetensors",
        f"./oil.safetensors#sha256={digest(style)}": "oil.safetensors",
    }
    for number, (reference, canonical) in enumerate(shown.items()):
        given = {"content_lora": "hf:o/m", "style_lora": reference, "output_format": output_format}
        files = weights.LoRAFiles(anywhere=True)
        (file,) = drawn(studio, files, settings / str(number), tokens, **given)
        told = read_provenance(file)
        assert told.loras["content_lora"] == UsedLoRA("hf:o/m", (digest(content),))
        assert told.loras["style_lora"] == UsedLoRA(canonical, (digest(style),))
        body = file.read_bytes()
        for secret in (*secrets, *tokens.values(), "CANARY"):
            assert secret.encode() not in body and secret.encode("utf-16-be") not in body


def test_a_server_tells_the_path_below_its_folder(studio: Studio, loras: Path, settings: Path) -> None:
    (settings / "root" / "deep").mkdir(parents=True)
    shutil.copy(loras / "sdxl_style.safetensors", settings / "root" / "deep" / "oil.safetensors")
    files = weights.LoRAFiles(settings / "root")
    (file,) = drawn(studio, files, settings / "out", style_lora="./deep//oil.safetensors")
    assert read_provenance(file).loras["style_lora"].reference == "deep/oil.safetensors"


def test_of_a_peft_repository_every_file_counts_wherever_it_is(
    studio: Studio, hub: Hub, settings: Path, loras: Path
) -> None:
    layers = {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in load(loras / "sdxl_style.safetensors").items()
    }
    (settings / "peft").mkdir()
    save(layers, settings / "peft" / "adapter_model.safetensors")
    (settings / "peft" / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 4, "peft_type": "LORA"}')
    hub.publish("o/m", {path.name: path.read_bytes() for path in (settings / "peft").iterdir()})
    used = []
    for reference in ("hf:o/m", "peft", "peft/adapter_model.safetensors"):
        (file,) = drawn(studio, weights.LoRAFiles(anywhere=True), settings / "out", style_lora=reference)
        used.append(read_provenance(file).loras["style_lora"].sha256)
    names = "adapter_model.safetensors", "adapter_config.json"
    assert used == [tuple(digest((settings / "peft" / name).read_bytes()) for name in names)] * 3


def test_a_local_file_is_read_for_its_sha256_once_and_again_when_it_was_replaced(tmp_path: Path) -> None:
    shelf, file = Shelf(), tmp_path / "dog.safetensors"
    file.write_bytes(b"one")
    status = file.stat()
    assert shelf.sha256(file) == (digest(b"one"),)
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that it looks as it did
    assert shelf.sha256(file) == (digest(b"one"),)
    os.utime(file, ns=(0, 0))
    assert shelf.sha256(file) == (digest(b"two"),)


def test_a_fetched_file_is_not_read_for_its_sha256(tmp_path: Path) -> None:
    """The cache has named its scores by it."""
    place = tmp_path / f"{SHA256}-{'b' * 64}.json"
    assert Shelf().sha256(tmp_path / "is not there", place) == (SHA256, "b" * 64)


@pytest.mark.parametrize("base", ["flux-schnell", "illustrious-xl"])
def test_a_base_that_klora_has_fetched_is_told_with_its_commits(tmp_path: Path, base: str) -> None:
    entry = BASES[base]
    with serving() as server:
        server.hub.publish(*entry.sources)
        server.hub.others[entry.repository] = server.hub.files | {"Illustrious-XL-v1.0.safetensors": b"weights"}
        folder = ensure_base(base, entry, tmp_path, endpoint=server.address)
    expected = {source.repository: source.revision for source in entry.sources}
    assert made(folder, model=base).sources == sources_of(base, folder) == expected
    assert sources_of(base, tmp_path) == {}


# The command.


@pytest.fixture
def shop(settings: Path, loras: Path) -> Path:
    """A working folder with the LoRAs in it."""
    for file in loras.iterdir():
        shutil.copy(file, settings / file.name)
    return settings


def pair(family: str) -> tuple[str, ...]:
    return "--content-lora", f"{family}_content.safetensors", "--style-lora", f"{family}_style.safetensors"


def fuse(*arguments: str) -> None:
    result = CliRunner().invoke(cli.app, ["fuse", "a photo of a dog", *QUICK, *arguments])
    assert result.exit_code == 0, result.stderr


def reproduce(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", *arguments])


def refusal(*arguments: str) -> str:
    result = reproduce(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.stderr
    assert not Path("reproduced").exists()
    return result.stderr.removeprefix("Error: ").strip()


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sdxl": ("png", pair("sdxl")),
    "flux": ("png", (*pair("flux"), "--go-fast", "--num-inference-steps", "6")),
    "one LoRA": ("webp", (*pair("sdxl")[:2], "--scheduler", "K_EULER_ANCESTRAL", "--content-scale", "2")),
    "none": ("jpg", ("--model", "illustrious-xl", "--width", "80", "--negative-prompt", "a cat")),
    "sum": ("png", (*pair("sdxl"), "--fusion", "sum", "--pattern", "s", "--no-add-triggers")),
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


def test_an_image_made_from_others_needs_them_again(shop: Path) -> None:
    NOISE.save("start.png")
    Image.linear_gradient("L").save("mask.png")
    Image.linear_gradient("L").rotate(90).save("other.png")
    fuse(*pair("sdxl"), "--output-format", "png", "--image", "start.png", "--mask", "mask.png")
    file = "out/klora_7_0.png"
    assert "start" not in repr(Image.open(file).info)
    assert refusal(file).startswith("The image was made with image ")
    assert refusal(file, "--image", "start.png").startswith("The image was made with mask ")
    assert refusal(file, "--image", "start.png", "--mask", "other.png").startswith("mask has pixels of sha256 ")
    NOISE.save("same.webp", lossless=True)
    result = reproduce(file, "--image", "same.webp", "--mask", "mask.png")
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.array_equal(pixels("reproduced/klora_7_0.png"), pixels(file))


def test_a_lora_elsewhere_serves_under_the_words_that_its_page_had(shop: Path, studio: Studio) -> None:
    file = shop / "sdxl_style.safetensors"
    asked = Request("a dog", style_lora="civitai:9", num_inference_steps=2, seed=7, disable_safety_checker=True)
    asked = replace(asked, output_format="png")
    lent = {"style_lora": Borrowed(file, shop / f"{digest(file.read_bytes())}.json", ("zork style", "sks"))}
    images = studio.make(asked, {"style_lora": file}, lent=lent)
    bare = studio.make(asked, {"style_lora": file})
    assert not np.array_equal(images[0], bare[0])
    (told,) = save_images(images, shop / "out", asked)
    assert read_provenance(told).loras["style_lora"].trigger == "zork style"
    file.rename(shop / "moved.safetensors")
    result = reproduce(str(told), "--style-lora", "moved.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    assert np.array_equal(pixels("reproduced/klora_7_0.png"), images[0])


@pytest.fixture(scope="module")
def original(bases: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a style LoRA."""
    with pytest.MonkeyPatch.context() as patch:
        folder = settled_in(tmp_path_factory.mktemp("original"), bases, patch)
        shutil.copy(loras / "sdxl_style.safetensors", folder)
        fuse(*pair("sdxl")[2:], "--output-format", "png")
        return folder / "out" / "klora_7_0.png"


@pytest.fixture
def image(shop: Path, original: Path) -> Path:
    (shop / "out").mkdir()
    return Path(shutil.copy(original, shop / "out"))


def rewritten(image: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """The same image with another record. change: of it, in place."""
    told = json.loads(Image.open(image).info["klora"])
    change(told)
    chunks = PngInfo()
    chunks.add_text("klora", json.dumps(told))
    Image.open(image).save("other.png", pnginfo=chunks)
    return "other.png"


def test_what_cannot_be_made_again_is_refused_in_a_sentence(
    shop: Path, image: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = digest((shop / "sdxl_style.safetensors").read_bytes())
    assert (
        refusal(str(image), "--mask", str(image)) == "mask is given, but the image was made without one. Leave it out."
    )
    assert refusal(str(image), "--content-lora", "a/b").startswith("content_lora is given, but")
    assert refusal(str(image), "--style-lora", "sdxl_content.safetensors") == (
        f"style_lora has the sha256 {digest((shop / 'sdxl_content.safetensors').read_bytes())}. "
        f"Expected the LoRA that the image was made with, {style}."
    )
    assert refusal(str(image), "--out", "out") == (
        "out is 'out', the image's own folder. Expected another, for names are the same."
    )
    data = rewritten(image, lambda told: told["loras"]["style_lora"].update(reference=f"data:{style}"))
    assert refusal(data) == "style_lora came in the request itself. Give its file by --style-lora."
    gone = rewritten(image, lambda told: told.update(place=1))
    assert "withheld image 1" in refusal(gone)
    (shop / "models").mkdir()
    (shop / "models" / "flux-dev").symlink_to(bases / "flux-dev")
    monkeypatch.setenv("KLORA_MODELS", str(shop / "models"))
    assert refusal(str(image)).startswith(f"sdxl is not installed: {shop / 'models'} has flux-dev.")


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no form": lambda told: told.pop("klora"),
    "no inputs": lambda told: told.pop("inputs"),
    "no prompt": lambda told: told["inputs"].pop("prompt"),
    "an image among the inputs": lambda told: told["inputs"].update(image="/etc/passwd"),
    "an input that there is not": lambda told: told["inputs"].update(x=1),
    "a third LoRA": lambda told: told["loras"].update(x=told["loras"]["style_lora"]),
    "a LoRA that is none": lambda told: told.update(loras={"style_lora": 1}),
    "a place that is none": lambda told: told.update(place="x"),
    "a list of versions": lambda told: told.update(versions=[]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_record_that_is_damaged_is_refused_in_a_sentence(shop: Path, damage: str) -> None:
    image = saved(made(loras={"style_lora": UsedLoRA("oil.safetensors", (SHA256,))}), shop / "out", "png")
    assert refusal(rewritten(image, DAMAGED[damage])) == (
        "other.png says how it was made in a record that is damaged. Expected klora's."
    )


def test_an_image_that_says_nothing_or_in_another_form_is_refused(image: Path) -> None:
    Image.open(image).save("bare.png")
    assert refusal("bare.png") == "bare.png does not say how it was made. Expected an image as klora has written it."
    assert refusal("sdxl_style.safetensors").startswith("sdxl_style.safetensors cannot be read as an image.")
    assert refusal(rewritten(image, lambda told: told.update(klora=2, inputs=[]))) == (
        "other.png says how it was made in form 2. Expected 1, which this klora reads."
    )
    assert refusal(rewritten(image, lambda told: told["inputs"].update(num_outputs=9))) == (
        "num_outputs is 9. Expected 1 to 4."
    )


def test_other_libraries_another_base_and_other_pixels_are_told(image: Path, bases: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["versions"]["torch"] = "1.0"
        told["sources"] = {"owner/sdxl": "c0ffee"}
        told["inputs"]["seed"] = 8

    result = reproduce(rewritten(image, change))
    most = np.abs(pixels("reproduced/klora_8_0.png").astype(int) - pixels(image)).max()
    assert (result.exit_code, result.stdout) == (0, "reproduced/klora_8_0.png\n")
    assert result.stderr.splitlines() == [
        f"Warning: torch was 1.0 and is {torch.__version__}, so that the image may come out otherwise.",
        "Warning: owner/sdxl was c0ffee and is unknown, so that the image may come out otherwise.",
        f"Warning: its pixels differ from those of other.png by up to {most} of 255.",
    ]


def test_an_image_that_was_made_smaller_since_is_told(image: Path) -> None:
    chunks = PngInfo()
    chunks.add_text("klora", Image.open(image).info["klora"])
    Image.open(image).resize((32, 32)).save("small.png", pnginfo=chunks)
    assert reproduce("small.png").stderr == "Warning: it is 64x64, and small.png is not.\n"
