"""The safety checker fails closed: without a whole one nothing is drawn, and what it flags is withheld."""

from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file

from klora.errors import SafetyError
from klora.form.request import Request
from klora.models.safety import SafetyChecker
from klora.studio import Studio, save_images
from test_folder import tiny
from test_folder.pairs import pair_of
from test_folder.studio.damaging import cut, lacking
from test_folder.studio.opening import CPU, made, open_studio, request, same
from test_folder.tiny import BASES


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
        "Fetch it by script/download-weights safety-checker, or set disable_safety_checker=true."
    )
    tiny.build_safety_checker(tmp_path / "checker")
    assert studio.make(checked(), {}).keys() == {0}


def test_the_checker_is_loaded_beside_the_thread_that_is_interrupted(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be fetched after set-up, and is loaded by a request then, which may be cancelled."""

    def load(*_: object, **__: object) -> None:
        raise OSError(f"in {'this' if get_ident() == here else 'another'} thread")

    here = get_ident()
    monkeypatch.setattr(StableDiffusionSafetyChecker, "from_pretrained", load)
    with pytest.raises(SafetyError, match=r"cannot be loaded: in another thread "):
        SafetyChecker.load(models / "safety-checker", CPU)


WEIGHTS = "model.safetensors"
THRESHOLDS = ("concept_embeds_weights", "special_care_embeds_weights")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / WEIGHTS).unlink(), id="no weights"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), id="no config"),
        pytest.param(lambda folder: (folder / "preprocessor_config.json").unlink(), id="no processor"),
        pytest.param(lambda folder: (folder / "preprocessor_config.json").write_text("[]"), id="odd processor"),
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


@pytest.mark.parametrize("family", BASES)
def test_images_that_pass_the_check_are_not_touched_by_it(studio: Studio, loras: Path, family: str) -> None:
    files = pair_of(loras, family)
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
