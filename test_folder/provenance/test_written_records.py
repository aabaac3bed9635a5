"""A record reads back from every format, whatever the prompt, and viewers find in it what they look for."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import ExifTags, Image

from klora.errors import RequestError
from klora.studio.provenance import MAX_COMMENT_BYTES, MAX_XMP_BYTES, UsedLoRA, picture_sha256, read_provenance, stamp
from test_folder.provenance.records import FORMATS, SHA256, made, saved


def parameters(file: Path) -> str:
    """As viewers find them: PNG's text chunk, EXIF's UserComment, of which eight bytes name the encoding."""
    with Image.open(file) as image:
        if image.format == "PNG":
            return image.info["parameters"]
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_character_survives_in_prompts_of_ten_thousand(tmp_path: Path, output_format: str) -> None:
    """But for halves of characters, which no prompt has."""
    whole = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(whole), 10_000):
        prompt = "".join(whole[start : start + 10_000])
        told = made(prompt=prompt)
        file = saved(told, tmp_path, output_format)
        assert read_provenance(file) == told
        assert parameters(file).startswith(prompt)


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


def test_the_xmp_is_xml_whatever_a_prompt_or_a_files_name_holds() -> None:
    told = made(prompt="\ufffe\uffff\0<&>\x1f", loras={"style_lora": UsedLoRA("\udc80", (SHA256,))})
    (record,) = ElementTree.fromstring(stamp(told, (8, 8), "webp")["xmp"]).itertext()
    assert json.loads(record)["inputs"]["prompt"] == told.inputs["prompt"]


def test_pictures_of_the_same_bytes_and_another_size_or_mode_are_others() -> None:
    pictures = [Image.new(mode, size) for mode, size in (("L", (3, 2)), ("L", (2, 3)), ("P", (2, 3)))]
    assert len({picture.tobytes() for picture in pictures}) == 1 and len(set(map(picture_sha256, pictures))) == 3


def test_the_parameters_are_those_that_viewers_read() -> None:
    """Stored: the prompts, and a last line of pairs, in which what has a separator in it is quoted."""
    loras = {
        "content_lora": UsedLoRA("hf:someone/dog", (SHA256,)),
        "style_lora": UsedLoRA("my, öl.safetensors", ("b" * 64,)),
    }
    told = replace(made(loras=loras, negative_prompt="blurry", scheduler="DDIM", num_outputs=4), place=2)
    version = told.versions["klora"]
    assert told.parameters((1344, 768)) == (
        "a dog\nNegative prompt: blurry\n"
        "Steps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 9, Size: 1344x768, Model: sdxl, "
        'Content LoRA: "hf:someone/dog", Style LoRA: "my, öl.safetensors", '
        f'Version: klora {version}, Hashes: {{"lora:dog": "0123456789", "lora:my, \\u00f6l": "bbbbbbbbbb"}}'
    )
    assert "Seed: 7," in replace(told, place="compare").parameters((1344, 768))  # all of a sheet have one


def test_the_parameters_of_a_lora_whose_name_has_two_lines_are_one_line() -> None:
    told = made(loras={"style_lora": UsedLoRA("two\nlines", (SHA256,))})
    assert told.parameters((8, 8)).count("\n") == 1  # between the prompt and it


@pytest.mark.parametrize("references", [("x/a.safetensors", "y/a.safetensors"), ("hf:a/b@v1.0", "hf:a/b@v1.1")])
def test_two_loras_of_one_name_have_both_their_hashes(references: tuple[str, str]) -> None:
    content, style = references
    told = made(loras={"content_lora": UsedLoRA(content, (SHA256,)), "style_lora": UsedLoRA(style, ("b" * 64,))})
    hashes = told.parameters((8, 8)).partition("Hashes: ")[2]
    assert json.loads(hashes) == {f"lora:{content}": "0123456789", f"lora:{style}": "bbbbbbbbbb"}
