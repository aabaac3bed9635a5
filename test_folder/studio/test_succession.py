"""One request after another: what was asked, refused or broken off before changes nothing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import weights
from klora.cache import Borrowed
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.studio import Studio
from test_folder import tiny
from test_folder.pairs import pair_of
from test_folder.studio.opening import OTHER, Images, made, request, same
from test_folder.tiny import BASES

COMPONENT = {"sdxl": "unet", "flux": "transformer"}

OWN = {"content_lora": "{family}_content.safetensors", "style_lora": "{family}_style.safetensors"}
FAILURES: dict[str, tuple[dict[str, Any], dict[str, str], type[KLoRAError]]] = {
    "wrong family": ({}, OWN | {"style_lora": "{other}_style.safetensors"}, LoRAError),
    "no such layer": ({}, OWN | {"style_lora": "strange.safetensors"}, LoRAError),
    "size": ({"width": 100, "height": 100}, OWN, RequestError),
    "no content": ({"fusion": "content"}, {"style_lora": OWN["style_lora"]}, RequestError),
}


@pytest.mark.parametrize("family", BASES)
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
            request(model=BASES[family], **given),
            {role: Borrowed(folder / name.format(family=family, other=OTHER[family])) for role, name in files.items()},
        )
    assert same(made(studio, request(), pair_of(loras, family)), first[family])


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("last", [0, 2, 3])
def test_after_an_interrupted_request_the_next_draws_as_at_first(
    studio: Studio, first: dict[str, Images], loras: Path, family: str, last: int
) -> None:
    def interrupt(step: int, _: int) -> None:
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.make(request(fusion="sum", seed=1, num_outputs=2), pair_of(loras, family), on_step=interrupt)
    assert same(made(studio, request(), pair_of(loras, family)), first[family])


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
        return made(place, request(**given), pair_of(loras, family))

    numbers = range(len(REQUESTS))
    forwards = [draw(fresh, number) for number in numbers]
    torch.rand(5)
    backwards = [draw(studio, number) for number in reversed(numbers)][::-1]
    assert all(map(same, forwards, backwards))
    assert not any(same(forwards[first], forwards[second]) for first in numbers for second in range(first))


@pytest.mark.parametrize("family", BASES)
def test_a_request_draws_nothing_from_the_global_generators(studio: Studio, loras: Path, family: str) -> None:
    torch.manual_seed(5)
    studio.load(*weights.find_base(BASES[family]))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    studio.make(request(num_outputs=2), pair_of(loras, family))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
