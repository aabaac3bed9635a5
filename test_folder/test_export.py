"""A fusion baked into one ordinary LoRA: against dense sums of what K-LoRA applies, and drawn by stock diffusers."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from klora import Fusion, LoRA, LowRank, Schedule, attached, cli, fuse, load_model, save_lora
from klora.cache import Borrowed
from klora.errors import KLoRAError, LoRAError, RequestError
from klora.export import DTYPES, baked, errors, exported, reduced, rounded
from klora.files.lycoris import MAX_RANK
from klora.form.pair import Export
from klora.lora import Plan
from klora.models.family import Family
from test_folder import tiny
from test_folder.pairs import pair_of

STEPS = 8
BASES = {"sdxl": "sdxl", "flux": "flux-dev"}
# Of many forms; ranks 6 and 5 are more than the sides of the thin ones.
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32), "thin": (3, 30), "small": (4, 2), "even": (16, 16)}
OWN = {"content": "contents_own", "style": "styles_own"}


def pairs(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, LowRank]:
    return {name: LowRank(*factors) for name, factors in tiny.random_lora(shapes, rank, seed=seed).items()}


def lora(role: str, rank: int, seed: int, **texts: Mapping[str, LowRank]) -> LoRA:
    return LoRA(pairs({**SHAPES, OWN[role]: (12, 20)}, rank, seed), texts)


@pytest.fixture(scope="module")
def fusion() -> Fusion:
    texts = [pairs(dict.fromkeys(names, (10, 14)), 3, seed) for seed, names in enumerate(("ab", "bc"), 5)]
    content, style = lora("content", 6, 0, text_encoder=texts[0]), lora("style", 5, 1, text_encoder=texts[1])
    return fuse(content, style)


@pytest.fixture(scope="module")
def wins(fusion: Fusion) -> Tensor:
    found = fusion.content_wins(Schedule.from_pattern("s"), STEPS)
    assert (found.any(0) & ~found.all(0)).any(), "no layer flips, and there is nothing to average"
    return found


def dense(pair: LowRank | None, like: LowRank | None = None) -> Tensor:
    if pair is None:
        return torch.zeros_like(dense(like))
    return pair.B.double() @ pair.A.double()


def average(
    fusion: Fusion, wins: Tensor, steps: Sequence[int], scales: tuple[float, float]
) -> dict[str, tuple[Tensor, set[str]]]:
    """{layer: (the mean of what is applied, the LoRAs that are ever applied)}, a step at a time."""
    found = {}
    for index, name in enumerate(fusion.layers):
        total, seen = 0.0, set()
        for step in steps:
            role = "content" if wins[step, index] else "style"
            pair, scale = getattr(fusion, role).get(name), scales[role == "style"]
            if pair is not None and scale:
                total, seen = total + scale * dense(pair) / len(steps), seen | {role}
        found[name] = total, seen
    return found


# The mean.


@pytest.mark.parametrize("steps", [None, (0, 1), (2, 7), (7, 8)], ids=str)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, -0.5), (1.3, 0.0), (0.0, 1.0)], ids=str)
def test_a_layer_is_the_mean_of_what_is_applied(
    fusion: Fusion, wins: Tensor, steps: tuple[int, int] | None, scales: tuple[float, float]
) -> None:
    seen = baked(fusion, wins, *scales, steps)
    for name, (meant, acting) in average(fusion, wins, range(*(steps or (0, STEPS))), scales).items():
        if acting:
            assert (dense(seen[name]) - meant).abs().max() < 1e-6 * meant.abs().max(), name
            assert seen[name].rank == sum({"content": 6, "style": 5}[role] for role in acting), name
        else:
            assert name not in seen
    assert OWN["content"] in seen or OWN["style"] in seen


def test_text_encoders_are_the_sum_at_the_scales(fusion: Fusion, wins: Tensor) -> None:
    """Whatever the steps: they run before the first."""
    content, style = (part.text_encoders["text_encoder"] for part in (fusion.content, fusion.style))
    for steps in (None, (0, 1)):
        seen = baked(fusion, wins, 0.5, -2.0, steps).text_encoders["text_encoder"]
        assert seen.keys() == {"a", "b", "c"}
        for name, pair in seen.items():
            like = content.get(name) or style.get(name)
            meant = 0.5 * dense(content.get(name), like) - 2.0 * dense(style.get(name), like)
            assert (dense(pair) - meant).abs().max() < 1e-6
    assert baked(fusion, wins, 0.0, 1.0).text_encoders["text_encoder"].keys() == {"b", "c"}


def test_where_no_layer_flips_the_weights_are_those_of_k_lora(fusion: Fusion) -> None:
    """At each of its steps, by the engine that writes weights."""
    schedule = Schedule.from_pattern("s")
    module = nn.ModuleDict({name: nn.Linear(pair.A.shape[1], len(pair.B)) for name, pair in merged(fusion).items()})
    wins = fusion.content_wins(schedule, STEPS)
    steps = next((i, i + 2) for i in range(STEPS - 1) if torch.equal(wins[i], wins[i + 1]))
    alone = weights_with(module, Plan.constant((baked(fusion, wins, 0.8, 1.2, steps),), (1.0,)), 0)
    everywhere = weights_with(module, Plan.constant((baked(fusion, wins, 0.8, 1.2),), (1.0,)), 0)
    plan = fusion.plan(schedule, steps=STEPS, content_scale=0.8, style_scale=1.2)
    for step in range(*steps):
        meant = weights_with(module, plan, step)
        assert max((alone[name] - meant[name]).abs().max() for name in meant) < 1e-6
        assert max((everywhere[name] - meant[name]).abs().max() for name in meant) > 1e-2


def merged(fusion: Fusion) -> dict[str, LowRank]:
    return {**fusion.content, **fusion.style}


def weights_with(module: nn.ModuleDict, plan: Plan, step: int) -> dict[str, Tensor]:
    with torch.no_grad(), attached(module, plan, engine="merged") as gate:
        gate.set_step(step)
        return {name: linear.weight.clone() for name, linear in module.items()}


# The rank.


@pytest.mark.parametrize("rank", [1, 3, 7, 100])
def test_a_lower_rank_is_the_truncated_svd_of_the_dense_matrix(fusion: Fusion, wins: Tensor, rank: int) -> None:
    exact = baked(fusion, wins)
    seen = reduced(exact, rank)
    for name, pair in exact.items():
        U, s, V = torch.linalg.svd(dense(pair), full_matrices=False)
        best = U[:, :rank] * s[:rank] @ V[:rank]
        assert (dense(seen[name]) - best).abs().max() < 1e-6 * s[0], name
        assert seen[name].rank == (min(rank, *SHAPES.get(name, (12, 20))) if pair.rank > rank else pair.rank)
        assert seen[name].A.dtype == seen[name].B.dtype == torch.float32
    assert all(pair.rank <= rank for pair in seen.text_encoders["text_encoder"].values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 100])
def test_errors_are_the_dense_norms(fusion: Fusion, wins: Tensor, rank: int, dtype: str) -> None:
    exact = baked(fusion, wins)
    kept = rounded(reduced(exact, rank), DTYPES[dtype])
    each, total = errors(exact, kept)
    texts = exact.text_encoders["text_encoder"], kept.text_encoders["text_encoder"]
    whole = {**exact, **{f"text_encoder.{name}": pair for name, pair in texts[0].items()}}
    kept_of = {**kept, **{f"text_encoder.{name}": pair for name, pair in texts[1].items()}}
    lost = {name: (dense(pair) - dense(kept_of[name])).norm() for name, pair in whole.items()}
    assert each == pytest.approx({name: float(lost[name] / dense(whole[name]).norm()) for name in whole}, abs=1e-12)
    norms = [
        torch.stack([*norms]).norm() for norms in (lost.values(), map(torch.linalg.norm, map(dense, whole.values())))
    ]
    assert total == pytest.approx(float(norms[0] / norms[1]), abs=1e-12)
    assert total > 0.05 if rank == 2 else total < 0.01


def test_a_layer_of_zeros_has_no_error() -> None:
    zero = LoRA({"x": LowRank(torch.ones(2, 4), torch.zeros(4, 2))})
    assert errors(zero, zero) == ({"x": 0.0}, 0.0)


# Files.


@pytest.fixture(scope="module")
def families(bases: Path) -> dict[str, Family]:
    return {family: load_model(family, bases / base, torch.device("cpu")) for family, base in BASES.items()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "fused.safetensors"


def installed(bases: Path) -> dict[str, tuple[str, Path]]:
    return {base: (family, bases / base) for family, base in BASES.items()}


def wanted(**given: Any) -> Export:
    return Export(**{"content_lora": "a", "style_lora": "b", "num_inference_steps": STEPS, **given})


def test_the_form_takes_the_ranks_and_dtypes_that_a_file_can_have() -> None:
    asked = Export.__dataclass_fields__
    assert (asked["rank"].metadata["le"], asked["dtype"].metadata["choices"]) == (MAX_RANK, tuple(DTYPES))


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {**metadata, "klora_export": json.loads(metadata["klora_export"])}


def with_text_encoder(model: Family, given: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The same LoRAs, each with a text encoder's layers, and the trigger word of a training."""
    texts = tiny.linear_shapes(model.text_encoders["text_encoder"])
    found = {}
    for seed, (name, path) in enumerate(given.items()):
        read = model.read_lora(path)
        both = LoRA(read.layers, {"text_encoder": pairs(texts, 2, seed)}, {"trigger": ("sbu", "szn")[seed]})
        found[name] = save_lora(folder / path.name, both, model.component)
    return found


@pytest.mark.parametrize("family", BASES)
def test_stock_diffusers_draws_what_the_constant_plan_draws(
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path, family: str
) -> None:
    model = families[family]
    given = with_text_encoder(model, pair_of(loras, family), tmp_path)
    options = {"pattern": "s", "alpha": 1.2, "beta": 0.6, "style_bias": 0.8, "content_scale": 0.9, "style_scale": 0.6}
    told = exported(wanted(**options, steps="2:7", dtype="fp32"), given, installed(bases), out)
    assert told.ranks == (4, 12), "layers of several ranks, each of which a loader has to find"

    content, style = (model.read_lora(path) for path in given.values())
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
    fusion = fuse(*(model.read_lora(path) for path in given.values()))
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
    fusion = fuse(*(families["sdxl"].read_lora(path) for path in given.values()))
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
        tmp_path / "bare.safetensors", LoRA(families["sdxl"].read_lora(given["style_lora"]).layers), "unet"
    )
    reference = "https://example.com/oil.safetensors?X-Amz-Signature=hidden&id=7"
    asked = wanted(content_lora=str(given["content_lora"]), style_lora=reference, pattern="s", steps="0:3", rank=2)
    scores = tmp_path / f"{'0' * 64}.json"
    lent = {"style_lora": Borrowed(bare, scores, ("zork style", "zork"))}
    told = exported(asked, {**given, "style_lora": bare}, installed(bases), out, lent)
    said = header(out)
    facts = said["klora_export"]
    assert (said["trigger"], said["modelspec.trigger_phrase"]) == ("sbu", "sbu, zork style")
    assert (said["lora_type"], said["family"]) == ("fusion", "SDXL")
    assert (facts["content_lora"], facts["content_trigger"]) == ("sdxl_content.safetensors", "sbu")
    assert facts["content_sha256"] == [sha256(given["content_lora"].read_bytes()).hexdigest()]
    assert facts["style_sha256"] == ["0" * 64], "as the cache names the file's scores"
    assert facts["style_lora"].startswith("https://example.com/oil.safetensors")
    assert (facts["pattern"], facts["alpha"], facts["beta"], facts["style_bias"]) == ("s", 1.5, 0.5, 1.0)
    assert (facts["steps"], facts["num_inference_steps"], facts["rank"], facts["dtype"]) == ([0, 3], STEPS, 2, "fp16")
    assert (facts["contradicted"], facts["error"]) == (told.contradicted, told.error)
    assert facts["exact"] is False and facts["largest_error"] == {told.worst: told.errors[told.worst]}
    assert not [key for key in said if key.startswith("ss_")]
    assert b"hidden" not in out.read_bytes() and str(tmp_path).encode() not in out.read_bytes()
    assert scores.is_file(), "another export would score the file again"


# Refusals.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "3:3"}, "steps is 3:3. Expected"),
        ({"steps": "5:2"}, "steps is 5:2. Expected"),
        ({"steps": f"0:{STEPS + 1}"}, f"steps is 0:{STEPS + 1}. Expected A:B with A < B, from 0 to {STEPS}."),
        ({"steps": "3"}, "steps is '3'. Expected A:B"),
        ({"steps": "-1:3"}, "steps is '-1:3'. Expected A:B"),
        ({"steps": ""}, "steps is ''. Expected A:B"),
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
    families: dict[str, Family], bases: Path, loras: Path, tmp_path: Path, out: Path
) -> None:
    given = with_text_encoder(families["sdxl"], pair_of(loras, "sdxl"), tmp_path)
    with pytest.raises(RequestError, match="format is kohya"):
        exported(wanted(format="kohya"), given, installed(bases), out)
    assert not out.exists()


def test_words_are_refused(fusion: Fusion, wins: Tensor) -> None:
    taught = LoRA(fusion.style, words={"TOK": {"text_encoder": torch.zeros(1, 32)}})
    with pytest.raises(LoRAError, match=r"^style_lora teaches the word 'TOK'\."):
        baked(Fusion(fusion.layers, fusion.content, taught, *scores_of(fusion)), wins)


def scores_of(fusion: Fusion) -> tuple[Tensor, Tensor, float]:
    return fusion.content_score, fusion.style_score, fusion.gamma


def test_what_no_file_can_hold_is_refused() -> None:
    large = LoRA({"x": LowRank(torch.full((1, 4), 1e5), torch.ones(4, 1))})
    with pytest.raises(KLoRAError, match="'x' has numbers that are too large for torch"):
        rounded(large, torch.float16)
    assert rounded(large, torch.bfloat16)["x"].A.isfinite().all()
    many = LoRA({"x": LowRank(torch.ones(513, 4), torch.ones(4, 513))})
    with pytest.raises(KLoRAError, match=r"'x' would have rank 513\. Expected at most 512"):
        rounded(many, torch.float32)
    assert rounded(reduced(many, 512), torch.float32)["x"].rank == 4


# The command.


def test_the_command_writes_the_file_and_says_how_far_it_is(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.chdir(tmp_path)
    options = {
        "--pattern": "s", "--alpha": "1.2", "--beta": "0.6", "--style-bias": "0.9", "--content-scale": "0.8",
        "--style-scale": "1.1", "--steps": "1:4", "--num-inference-steps": "6", "--rank": "5", "--dtype": "bf16",
    }  # fmt: skip
    given = pair_of(loras, "flux")
    command = ["export", *map(str, given.values()), "--out", "fused.safetensors"]
    result = CliRunner().invoke(cli.app, [*command, *(text for option in options.items() for text in option)])
    assert (result.exit_code, result.stderr) == (0, "")
    asked = wanted(
        pattern="s", alpha=1.2, beta=0.6, style_bias=0.9, content_scale=0.8, style_scale=1.1, steps="1:4",
        num_inference_steps=6, rank=5, dtype="bf16", **{name: str(path) for name, path in given.items()},
    )  # fmt: skip
    told = exported(asked, given, installed(bases), Path("again.safetensors"))
    assert result.stdout == f"fused.safetensors\n{told}\n"
    facts = header(Path("fused.safetensors"))["klora_export"]
    assert facts == header(Path("again.safetensors"))["klora_export"]
    applied = {"alpha": 1.2, "beta": 0.6, "style_bias": 0.9, "content_scale": 0.8, "style_scale": 1.1, "rank": 5}
    assert {name: facts[name] for name in applied} == applied
    with safe_open("fused.safetensors", "pt") as one, safe_open("again.safetensors", "pt") as other:
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in other.keys())  # noqa: SIM118


def test_the_command_refuses_in_one_line_and_its_help_says_what_an_average_is_not(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLORA_MODELS", str(bases))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    command = ["export", *map(str, pair_of(loras, "sdxl").values())]
    refused = CliRunner().invoke(cli.app, [*command, "--out", "x.safetensors", "--steps", "2:2"])
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("Error: steps is 2:2.")
    assert CliRunner().invoke(cli.app, command).exit_code == 2  # no --out
    assert list(tmp_path.iterdir()) == []
    text = " ".join(CliRunner().invoke(cli.app, ["export", "--help"]).stdout.split())
    assert "K-LoRA itself only where no layer flips in them, and another thing elsewhere" in text
