"""Which of the files that lie together is the LoRA: told by their names, at a hub, on a disk and in a tar alike."""

from pathlib import Path

import pytest
from safetensors.torch import save, save_file

from klora.file_names import lora_among
from klora.files.container import opened
from test_folder.fakes import tarred
from test_folder.files.reading import GOOD, pair
from test_folder.files.spelling import keyed


@pytest.mark.parametrize(
    ("names", "lora"),
    [
        ("d", "d"),
        ("d_000000250", "d_000000250"),
        ("d d_000000250 d_000000500", "d"),
        ("d d-000010 d-step00000500 d_emb", "d"),
        ("d_000000250 d_000000500", None),
        ("d e_000000250", None),
        ("d d_000000250 e", None),
        ("d_emb e", None),
        ("d e lora", "lora"),
        ("lora pytorch_lora_weights", "pytorch_lora_weights"),
        ("", None),
    ],
)
def test_the_lora_is_the_one_to_which_the_others_belong(names: str, lora: str | None) -> None:
    assert lora_among([f"{name}.safetensors" for name in names.split()]) == (lora and f"{lora}.safetensors")


def test_a_trainers_folder_and_a_tar_of_it_are_read_as_the_finished_file(tmp_path: Path) -> None:
    early = keyed("unet.mid_block.attentions.0.proj_in", pair(32, 32))
    folder, tar = tmp_path / "dog", tmp_path / "dog.tar"
    folder.mkdir()
    for name, tensors in (("dog_000000250", early), ("dog", GOOD), ("dog_000000500", early)):
        save_file(tensors, folder / f"{name}.safetensors")
    tar.write_bytes(tarred({"dog_000000250.safetensors": save(early), "dog.safetensors": save(GOOD)}))
    for path in (folder, tar):
        with opened(path) as contents:
            assert contents.specs.keys() == GOOD.keys()
