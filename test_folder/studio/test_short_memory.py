"""Memory that is short is met before a request draws, or said in a sentence."""

from pathlib import Path

import pytest
import torch

from klora.errors import RequestError
from klora.studio import Studio
from test_folder.pairs import pair_of
from test_folder.studio.opening import Images, made, request, same
from test_folder.tiny import BASES


@pytest.mark.parametrize("place", ["klora.generation.combine", "diffusers.AutoencoderKL.decode"])
@pytest.mark.parametrize("family", BASES)
def test_a_device_that_runs_out_of_memory_is_told_and_the_next_request_draws_as_at_first(
    studio: Studio, first: dict[str, Images], loras: Path, family: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    with monkeypatch.context() as patch, pytest.raises(RequestError) as error:
        patch.setattr(place, full)
        studio.make(request(), pair_of(loras, family))
    assert str(error.value) == "cpu has too little memory for these images. Ask for fewer, or smaller."
    assert same(made(studio, request(), pair_of(loras, family)), first[family])


def test_the_engine_is_chosen_for_the_size_that_is_asked_for(
    studio: Studio, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("klora.layers.headroom_bytes", lambda pixels: sizes.append(pixels) or 0)
    studio.make(request(width=96, height=128), pair_of(loras, "sdxl"))
    assert sizes[-1] == 96 * 128  # before it text encoders were lent what they have of a LoRA
