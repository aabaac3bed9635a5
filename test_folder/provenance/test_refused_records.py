"""What cannot be made again, for its files or for its record, is refused in a sentence."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klora.studio.provenance import UsedLoRA
from test_folder.provenance.commands import refusal
from test_folder.provenance.records import SHA256, digest, made, rewritten, saved


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
    data = rewritten(image, lambda told: told["loras"]["style_lora"].update(reference=f"data:{style}"))
    given = f"Give its file, of sha256 {style}, by --style-lora."
    assert refusal(data) == f"style_lora came in the request itself. {given}"
    for name in ("elsewhere.safetensors", "loras/an odd: name", "x" * 1000, "a\0b.safetensors"):
        lost = rewritten(image, lambda told, name=name: told["loras"]["style_lora"].update(reference=name))
        assert refusal(lost) == f"style_lora was {name!r:.200}, which is not in the working folder. {given}"
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
    "a place beyond all": lambda told: told.update(place=math.inf),
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
    Image.open(image).save("other.eps")  # which Pillow would hand to Ghostscript
    assert refusal("other.eps") == "other.eps cannot be read as an image. Expected a PNG, JPEG or WebP file."
    assert refusal(rewritten(image, lambda told: told.update(klora=2, inputs=[]))) == (
        "other.png says how it was made in form 2. Expected 1, which this klora reads."
    )
    assert refusal(rewritten(image, lambda told: told["inputs"].update(num_outputs=9))) == (
        "num_outputs is 9. Expected 1 to 4."
    )
