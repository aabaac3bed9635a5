"""What cannot be exported, and what no file can hold."""

import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klora import Fusion, LoRA, LowRank, export
from klora.cache import Borrowed
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.export import baked, exported, reduced, rounded
from klora.models.family import Family
from test_folder.export.exporting import STEPS, installed, wanted, with_text_encoder
from test_folder.pairs import pair_of


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fusion is made."""
    monkeypatch.setattr(export, "fused", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "3:3"}, "steps is 3:3. Expected"),
        ({"steps": "5:2"}, "steps is 5:2. Expected"),
        ({"steps": f"0:{STEPS + 1}"}, f"steps is 0:{STEPS + 1}. Expected A:B with A < B, from 0 to {STEPS}."),
        ({"steps": "3"}, "steps is '3'. Expected A:B"),
        ({"steps": "-1:3"}, "steps is '-1:3'. Expected A:B"),
        ({"steps": ""}, "steps is ''. Expected A:B"),
        ({"steps": "0:3x"}, "steps is '0:3x'. Expected A:B"),
        ({"steps": f"0:{'9' * 5000}"}, "steps is '0:999"),
        ({"content_scale": 3.5}, "content_scale is 3.5. Expected -1 to 3."),
        ({"rank": 0}, "rank is 0. Expected 1 to 512."),
        ({"rank": 513}, "rank is 513. Expected 1 to 512."),
        ({"content_scale": 0, "style_scale": 0}, "content_scale is 0 and style_scale is 0, with which no layer"),
        ({"dtype": "int8"}, "dtype is 'int8'. Expected one of fp16, bf16, fp32."),
        ({"pattern": "t"}, "pattern is 't'."),
    ],
)
def test_what_makes_no_sense_is_refused(
    bases: Path, loras: Path, out: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        exported(wanted(**given), pair_of(loras, "sdxl"), installed(bases), out)
    assert str(refusal.value).startswith(message)
    assert not out.exists()


def test_without_a_base_that_reads_both_it_is_refused(loras: Path, out: Path) -> None:
    with pytest.raises(LoRAError, match="can only be exported by a base that reads both, but they were read without"):
        exported(wanted(), pair_of(loras, "sdxl"), {}, out)
    assert not out.exists()


def test_another_name_than_a_loras_is_refused(bases: Path, loras: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"out is 'fused\.pt'\. Expected a name that ends in \.safetensors\."):
        exported(wanted(), pair_of(loras, "sdxl"), installed(bases), tmp_path / "fused.pt")


def test_kohyas_format_takes_no_text_encoders(
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path, unscored: None
) -> None:
    given = with_text_encoder(families["sdxl"], pair_of(loras, "sdxl"), tmp_path)
    with pytest.raises(RequestError, match="format is kohya"):
        exported(wanted(format="kohya"), given, installed(bases), out)
    assert not out.exists()


@pytest.mark.parametrize("role", ["content", "style"])
def test_kohyas_format_takes_a_lora_whose_text_encoders_are_left_out(
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path, role: str
) -> None:
    pair, name = pair_of(loras, "sdxl"), f"{role}_lora"
    given = {**pair, name: with_text_encoder(families["sdxl"], pair, tmp_path)[name]}
    exported(wanted(format="kohya", **{f"{role}_scale": 0}), given, installed(bases), out)
    assert not any("_te" in key for key in load_file(out))


def test_words_are_refused(fusion: Fusion, wins: Tensor) -> None:
    taught = LoRA(fusion.style, words={"TOK": {"text_encoder": torch.zeros(1, 32)}})
    with pytest.raises(LoRAError, match=r"^style_lora teaches the word 'TOK'\."):
        baked(replace(fusion, style=taught), wins)


def test_steps_that_a_run_does_not_have_and_words_are_refused_before_layers_are_scored(
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path, unscored: None
) -> None:
    pair = pair_of(loras, "sdxl")
    with pytest.raises(RequestError, match=r"^steps is 0:31\. Expected A:B with A < B, from 0 to 30\."):
        exported(wanted(num_inference_steps=None, steps="0:31"), pair, installed(bases), out)
    taught = tmp_path / "taught.safetensors"
    width = families["sdxl"].text_encoders["text_encoder"].config.hidden_size
    save_file({**load_file(pair["style_lora"].path), "bundle_emb.szn.clip_l": torch.zeros(1, width)}, taught)
    with pytest.raises(LoRAError, match=r"^style_lora teaches the word 'szn'\."):
        exported(wanted(), {**pair, "style_lora": Borrowed(taught)}, installed(bases), out)


def test_what_no_file_can_hold_is_refused() -> None:
    large = LoRA({"x": LowRank(torch.full((1, 4), 1e5), torch.ones(4, 1))})
    with pytest.raises(KLoRAError, match="'x' has numbers that are too large for torch"):
        rounded(large, torch.float16)
    assert rounded(large, torch.bfloat16)["x"].A.isfinite().all()
    many = LoRA({"x": LowRank(torch.ones(513, 4), torch.ones(4, 513))})
    with pytest.raises(KLoRAError, match=r"'x' would have rank 513\. Expected at most 512"):
        rounded(many, torch.float32)
    assert rounded(reduced(many, 512), torch.float32)["x"].rank == 4
    most = LoRA({"x": LowRank(torch.ones(512, 4), torch.ones(4, 512))})
    assert rounded(most, torch.float32)["x"].rank == 512


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_file_for_which_there_is_no_room_is_refused_and_leaves_nothing(
    bases: Path, loras: Path, out: Path, form: str
) -> None:
    most, usual = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most[1]))
        with pytest.raises(RequestError, match=r"^The LoRA could not be written: .* Expected more room on the disk"):
            exported(wanted(format=form), pair_of(loras, "flux"), installed(bases), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, usual)
    assert [*out.parent.iterdir()] == []
