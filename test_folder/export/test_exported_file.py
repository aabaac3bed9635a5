"""The file that an export leaves: drawn by stock diffusers, read by klora, and what it tells."""

from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from klora import LoRA, Schedule, attached, fuse, save_lora
from klora.cache import Borrowed
from klora.export import DTYPES, _metadata, baked, exported, reduced
from klora.files.lycoris import MAX_RANK
from klora.form.pair import Export
from klora.lora import Plan
from klora.models.family import Family
from test_folder.export.exporting import STEPS, dense, header, installed, wanted, with_text_encoder
from test_folder.pairs import pair_of
from test_folder.tiny import BASES


def test_the_form_takes_the_ranks_and_dtypes_that_a_file_can_have() -> None:
    asked = Export.__dataclass_fields__
    assert (asked["rank"].metadata["le"], asked["dtype"].metadata["choices"]) == (MAX_RANK, tuple(DTYPES))


@pytest.mark.parametrize("family", BASES)
def test_stock_diffusers_draws_what_the_constant_plan_draws(
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path, family: str
) -> None:
    model = families[family]
    given = with_text_encoder(model, pair_of(loras, family), tmp_path)
    options = {"pattern": "s", "alpha": 1.2, "beta": 0.6, "style_bias": 0.8, "content_scale": 0.9, "style_scale": 0.6}
    told = exported(wanted(**options, steps="2:7", dtype="fp32"), given, installed(bases), out)
    assert told.ranks == (4, 12), "layers of several ranks, each of which a loader has to find"

    content, style = (model.read_lora(file.path) for file in given.values())
    fusion = fuse(content, style)
    gates = fusion.plan(
        Schedule.from_pattern("s", 1.2, 0.6), steps=STEPS, content_scale=0.9, style_scale=0.6, style_bias=0.8
    ).gates[2:7]
    texts = tuple(part.text_encoders["text_encoder"] for part in (content, style))
    with ExitStack() as loans:
        loans.enter_context(attached(model.text_encoders["text_encoder"], Plan.constant(texts, (0.9, 0.6))))
        loans.enter_context(attached(model.denoiser, Plan(fusion.layers, (content, style), gates.mean(0)[None])))
        meant = drawn(model.pipe)
    stock = type(model.pipe).from_pretrained(bases / BASES[family])
    bare = drawn(stock)
    stock.load_lora_weights(out)
    seen = drawn(stock)
    assert np.abs(meant - bare).max() > 0.05
    assert np.abs(seen - meant).max() < 1e-4


def drawn(pipe: Any) -> np.ndarray:
    """An image, float [64, 64, 3] in 0 .. 1."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "np"}
    return pipe("a photo of a dog", generator=torch.Generator().manual_seed(3), **call).images[0]


# kohya's names of FLUX.1 are read at its own width alone; test_kohya.py has them.
@pytest.mark.parametrize(("family", "form"), [("sdxl", "diffusers"), ("flux", "diffusers"), ("sdxl", "kohya")])
def test_klora_reads_what_it_exports(
    families: dict[str, Family], bases: Path, loras: Path, out: Path, family: str, form: str
) -> None:
    model, given = families[family], pair_of(loras, family)
    told = exported(wanted(format=form, dtype="fp32", rank=3), given, installed(bases), out)
    seen = model.read_lora(out)
    fusion = fuse(*(model.read_lora(file.path) for file in given.values()))
    meant = reduced(baked(fusion, fusion.content_wins(Schedule.from_pattern("auto"), STEPS)), 3)
    assert seen.keys() == meant.keys() and len(told.errors) == len(meant)
    with safe_open(out, "pt") as file:
        assert all(key.startswith("lora_unet_" if form == "kohya" else f"{model.component}.") for key in file.keys())  # noqa: SIM118
    for name, pair in meant.items():
        assert (dense(seen[name]) - dense(pair)).abs().max() < 1e-6


def test_what_is_told_is_what_a_count_of_the_decisions_finds(
    families: dict[str, Family], bases: Path, loras: Path, out: Path
) -> None:
    given = pair_of(loras, "sdxl")
    told = exported(wanted(pattern="s", steps="1:6"), given, installed(bases), out)
    fusion = fuse(*(families["sdxl"].read_lora(file.path) for file in given.values()))
    wins = fusion.content_wins(Schedule.from_pattern("s"), STEPS)[1:6].T.tolist()
    flipping = [layer for layer in wins if len(set(layer)) == 2]
    fewer = [layer.count(sum(layer) < len(layer) / 2) for layer in flipping]
    assert 0 < len(flipping) < len(wins)
    assert told.flipping == pytest.approx(len(flipping) / len(wins))
    assert told.contradicted == pytest.approx(sum(fewer) / (5 * len(wins)))
    assert f"steps 1:6 of {STEPS}: an average" in str(told) and f"{told.contradicted:.1%} of layers and steps" in str(
        told
    )
    assert told.worst in str(told) and told.errors[told.worst] == max(told.errors.values())
    one = exported(wanted(pattern="s", steps="1:2"), given, installed(bases), out)
    assert (one.flipping, one.contradicted) == (0, 0) and f"steps 1:2 of {STEPS}: exact" in str(one)


def test_the_steps_are_the_bases_own_and_the_dtype_fp16(bases: Path, loras: Path, out: Path) -> None:
    told = exported(Export(content_lora="a", style_lora="b"), pair_of(loras, "sdxl"), installed(bases), out)
    assert told.steps == (0, 30, 30)
    with safe_open(out, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118, it is no mapping


def test_the_header_says_what_it_is_and_nothing_that_is_secret(
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path
) -> None:
    given = with_text_encoder(families["sdxl"], pair_of(loras, "sdxl"), tmp_path)
    bare = save_lora(
        tmp_path / "bare.safetensors", LoRA(families["sdxl"].read_lora(given["style_lora"].path).layers), "unet"
    )
    reference = "https://example.com/oil.safetensors?X-Amz-Signature=hidden&id=7"
    asked = wanted(content_lora=str(given["content_lora"].path), style_lora=reference, pattern="s", steps="0:3", rank=2)
    scores = tmp_path / f"{'0' * 64}.json"
    given["style_lora"] = Borrowed(bare, scores, ("zork style", "zork"))
    told = exported(asked, given, installed(bases), out)
    said = header(out)
    facts = said["klora_export"]
    assert (said["trigger"], said["modelspec.trigger_phrase"]) == ("sbu", "sbu, zork style")
    assert (said["lora_type"], said["family"]) == ("fusion", "SDXL")
    assert (facts["content_lora"], facts["content_trigger"]) == ("sdxl_content.safetensors", "sbu")
    assert facts["content_sha256"] == [sha256(given["content_lora"].path.read_bytes()).hexdigest()]
    assert facts["style_sha256"] == ["0" * 64], "as the cache names the file's scores"
    assert facts["style_lora"].startswith("https://example.com/oil.safetensors")
    assert (facts["pattern"], facts["alpha"], facts["beta"], facts["style_bias"]) == ("s", 1.5, 0.5, 1.0)
    assert (facts["steps"], facts["num_inference_steps"], facts["rank"], facts["dtype"]) == ([0, 3], STEPS, 2, "fp16")
    assert (facts["contradicted"], facts["error"]) == (told.contradicted, told.error)
    assert facts["exact"] is False and facts["largest_error"] == {told.worst: told.errors[told.worst]}
    assert not [key for key in said if key.startswith("ss_")]
    assert b"hidden" not in out.read_bytes() and str(tmp_path).encode() not in out.read_bytes()
    assert scores.is_file(), "another export would score the file again"


def test_a_word_that_calls_both_is_said_once() -> None:
    said = _metadata({"content_trigger": "sbu", "style_trigger": "sbu"}, "SDXL")
    assert said["modelspec.trigger_phrase"] == "sbu"
