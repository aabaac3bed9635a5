"""LoRA files as they are found: every way of writing reads as its author meant, and what is hostile is refused soon."""

import json
import math
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from klora.errors import LoRAError
from klora.files.container import MAX_TENSORS
from klora.files.lycoris import MAX_ERROR, MAX_RANK, low_rank
from klora.models.family import Family
from test_folder.files.reading import GOOD, KOHYA_Q, Q, assert_is_a_sentence, pair, read
from test_folder.files.spelling import KOHYA, keyed
from test_folder.variants import VARIANTS, Variant, largest_error, table
from test_folder.waiting import at_most

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loras.md"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.family}, {v.name}")
def test_every_way_of_writing_means_the_same(families: dict[str, Family], tmp_path: Path, variant: Variant) -> None:
    count, error = largest_error(variant, families[variant.family], tmp_path)
    assert count > 10 and error < 1e-6


def test_the_page_shows_the_table(families: dict[str, Family], capsys: pytest.CaptureFixture[str]) -> None:
    made = table(families)
    with capsys.disabled():
        print(f"\n{made}")
    assert made in PAGE.read_text()


# Updates that are no pairs of factors.


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(40, 30, 3), (64, 48, 22), (600, 700, 24)])
def test_a_loha_is_exact_where_its_rank_allows_it(outputs: int, inputs: int, rank: int) -> None:
    """Of more than MAX_RANK products only what is near enough passes, and says how near it is."""
    parts = {f"hada_w{i}_{side}": torch.randn(size, generator=torch.Generator().manual_seed(i))
             for i in (1, 2) for side, size in (("a", (outputs, rank)), ("b", (rank, inputs)))}  # fmt: skip
    seen, error = low_rank("LoHa", parts, 0.5)
    w1, w2 = (parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2))
    assert_near(seen.B, seen.A, 0.5 * w1 * w2, error)
    assert (error == 0) is (rank * rank <= MAX_RANK)


@pytest.mark.parametrize("thin", [("w1",), ("w2",), ("w1", "w2"), ()])
def test_a_lokr_is_the_kronecker_product(thin: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, parts, whole = {"w1": (4, 6), "w2": (20, 30)}, {}, {}
    for name, (rows, columns) in sizes.items():
        a, b = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        full = torch.randn(rows, columns, generator=generator)
        parts |= {f"lokr_{name}_a": a, f"lokr_{name}_b": b} if name in thin else {f"lokr_{name}": full}
        whole[name] = a.double() @ b.double() if name in thin else full.double()
    seen, error = low_rank("LoKr", parts, 2.0)
    assert error < 1e-6
    assert_near(seen.B, seen.A, 2.0 * torch.kron(whole["w1"], whole["w2"]), error)


def test_the_nearest_pair_of_a_kronecker_product_is_the_one_of_its_largest_singular_values() -> None:
    w1, w2 = torch.diag(torch.logspace(0, -4, 8)), torch.diag(torch.logspace(0, -6, 100))
    seen, error = low_rank("LoKr", {"lokr_w1": w1, "lokr_w2": w2}, 1.0)
    values = torch.linalg.svdvals(torch.kron(w1.double(), w2.double()))
    lost = values[MAX_RANK:].square().sum().sqrt() / values.square().sum().sqrt()
    assert seen.rank == MAX_RANK and math.isclose(error, lost, rel_tol=1e-3)
    assert_near(seen.B, seen.A, torch.kron(w1.double(), w2.double()), error)


UNMOVED = {  # the last of the factors begins as zeros
    "LoHa": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 40), "hada_w2_b": (2, 40), "hada_w2_a": (32, 2)},
    "LoHa of many ranks": {"hada_w1_a": (32, 30), "hada_w1_b": (30, 40), "hada_w2_b": (30, 40), "hada_w2_a": (32, 30)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 10)},
    "diff": {"diff": (32, 40)},
}


@pytest.mark.parametrize("kind", UNMOVED)
def test_a_layer_that_training_did_not_move_is_a_pair_that_moves_nothing(kind: str) -> None:
    parts = {name: torch.ones(shape) for name, shape in UNMOVED[kind].items()}
    list(parts.values())[-1].zero_()
    seen, error = low_rank(kind.split()[0], parts, 2.0)
    assert seen.shape == (32, 40) and seen.rank > 0 and error == 0
    assert torch.equal(seen.B @ seen.A, torch.zeros(32, 40))


def test_a_difference_is_taken_when_a_low_rank_comes_near_it_and_says_so(sdxl: Family, tmp_path: Path) -> None:
    A, B = pair(32, 32, rank=4)
    lora = read(sdxl, tmp_path / "lora.safetensors", {f"{KOHYA_Q}.diff": B @ A})
    torch.testing.assert_close(lora[Q].B @ lora[Q].A, B @ A, rtol=1e-4, atol=1e-4)
    assert "1 diff" in str(lora.report)


def test_what_no_pair_comes_near_is_refused(sdxl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klora.files.lycoris.MAX_RANK", 8)
    with pytest.raises(LoRAError, match=rf"'{KOHYA_Q}'.* is \d+\.\d% away.*{MAX_ERROR:.0%}"):
        read(
            sdxl,
            tmp_path / "lora.safetensors",
            {f"{KOHYA_Q}.diff": torch.randn(32, 32, generator=torch.Generator().manual_seed(0))},
        )


@pytest.mark.parametrize(("lost", "taken"), [(0.009, True), (0.011, False)])
def test_one_percent_may_be_lost_to_rank(
    sdxl: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: float, taken: bool
) -> None:
    monkeypatch.setattr("klora.files.lycoris.MAX_RANK", 8)
    values = torch.zeros(32).index_fill(0, torch.arange(8), 1.0)
    values[8] = lost * 8**0.5  # of the norm of all
    U, V = (torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(i))).Q for i in (0, 1))
    difference = {f"{KOHYA_Q}.diff": U * values @ V}
    if taken:
        assert read(sdxl, tmp_path / "lora.safetensors", difference)[Q].rank == 8
    else:
        with pytest.raises(LoRAError, match=r"is 1\.1% away\. Expected at most 1%\.$"):
            read(sdxl, tmp_path / "lora.safetensors", difference)


def assert_near(B: Tensor, A: Tensor, meant: Tensor, error: float) -> None:
    """In the Frobenius norm, which is what the error is of."""
    seen = ((B.double() @ A.double() - meant).norm() / meant.norm()).item()
    assert seen <= 1.01 * error + 1e-6


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "diff"])
def test_a_linear_layer_may_be_written_as_a_convolution_of_one_pixel(sdxl: Family, tmp_path: Path, kind: str) -> None:
    (A, B), (C, D), (small, _) = pair(32, 32), pair(32, 32, seed=1), pair(8, 8, rank=8)
    tensors = {
        "LoRA": keyed(KOHYA_Q, (A, B), KOHYA),
        "LoHa": {f"{KOHYA_Q}.hada_{name}": x for name, x in (("w1_a", B), ("w1_b", A), ("w2_a", D), ("w2_b", C))},
        "LoKr": {f"{KOHYA_Q}.lokr_w1": torch.ones(4, 4), f"{KOHYA_Q}.lokr_w2": small},
        "diff": {f"{KOHYA_Q}.diff": B @ A},
    }[kind]
    flat = read(sdxl, tmp_path / "flat.safetensors", tensors)
    lora = read(sdxl, tmp_path / "lora.safetensors", {key: x[..., None, None] for key, x in tensors.items()})
    assert torch.equal(lora[Q].A, flat[Q].A) and torch.equal(lora[Q].B, flat[Q].B)
    assert kind != "LoRA" or (torch.equal(lora[Q].A, A) and torch.equal(lora[Q].B, B))


# Headers.


def written(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return path


def empty_tensors(count: int) -> bytes:
    spec = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"t{i}":{spec}' for i in range(count)) + "}").encode()


def one(key: str, shape: list[int]) -> bytes:
    return json.dumps({key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()


HOSTILE: dict[str, tuple[Callable[[], bytes], int | None, str]] = {
    "a length beyond the file": (lambda: b"{}", 2**64 - 1, "header"),
    "a header of spaces": (lambda: b"{}" + b" " * (99 << 20), None, "header"),
    "a million tensors": (lambda: empty_tensors(1_000_000), None, "header"),
    "too many tensors": (lambda: empty_tensors(MAX_TENSORS + 1), None, f"at most {MAX_TENSORS}"),
    "too many tensors, their fields spelled otherwise": (
        lambda: empty_tensors(MAX_TENSORS + 1).replace(b"data_o", rb"data\u005fo"), None, f"at most {MAX_TENSORS}"),
    "a long name": (lambda: one("x" * 300, [0]), None, "printable"),
    "a name with a NUL": (lambda: one("x\0y", [0]), None, "printable"),
    "a name that turns round": (lambda: one("x\u202ey", [0]), None, "printable"),
    "ten megabytes of brackets": (lambda: b"[" * (10 << 20), None, "cannot be read"),
    "ten megabytes of objects": (lambda: b'{"a":[' + b"{}," * (3 << 20) + b"{}]}", None, "cannot be read"),
    "a shape that overflows": (lambda: one("x", [2**63, 2**63]), None, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_soon_and_cheaply(sdxl: Family, tmp_path: Path, case: str) -> None:
    make, length, seen = HOSTILE[case]
    path = written(tmp_path / "lora.safetensors", make(), length=length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with at_most(seconds=5), pytest.raises(LoRAError) as refusal:
        sdxl.read_lora(path)
    assert_is_a_sentence(str(refusal.value), path, seen)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("rank", [513, 4096])
def test_a_rank_beyond_the_bound_is_refused(sdxl: Family, tmp_path: Path, rank: int) -> None:
    with pytest.raises(LoRAError, match=f"{rank}"):
        read(sdxl, tmp_path / "lora.safetensors", keyed(f"unet.{Q}", pair(32, 32, rank)))


def test_a_rank_may_exceed_the_layers_width(sdxl: Family, tmp_path: Path) -> None:
    assert read(sdxl, tmp_path / "lora.safetensors", keyed(f"unet.{Q}", pair(32, 32, 512)))[Q].rank == 512


def test_eight_thousand_blocks_are_refused_soon(sdxl: Family, tmp_path: Path) -> None:
    """diffusers' converter takes 42 s for as many."""
    stems = [f"lora_unet_input_blocks_{i}_1_proj_in" for i in range(8000)]
    tensors = {key: x for stem in stems for key, x in keyed(stem, (torch.ones(1, 1), torch.ones(1, 1)), KOHYA).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    with at_most(seconds=10), pytest.raises(LoRAError, match="8000 layers"):
        sdxl.read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("said", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_a_peft_repository_that_is_no_plain_lora_is_refused(sdxl: Family, tmp_path: Path, said: dict[str, Any]) -> None:
    save_file(keyed(f"base_model.model.{Q}", pair(32, 32)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2} | said))
    with pytest.raises(LoRAError, match=next(iter(said))):
        sdxl.read_lora(tmp_path)


# Fuzz.


NAMES = [f"unet.{Q}", KOHYA_Q, "lora_unet_input_blocks_3_1_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
         "bundle_emb.x.clip_l", "double_blocks.0.processor.qkv_lora1", "mystery"]  # fmt: skip
PARTS = [
    *("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "diff", "dora_scale"),
    *(
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "lokr_w1",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "down.weight",
    ),
]
keys = st.one_of(st.tuples(st.sampled_from(NAMES), st.sampled_from(PARTS)).map(".".join), st.text(max_size=20))
shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 32, 33]), max_size=4)
values = st.sampled_from([0.0, 1.0, -1.0, 1e-8, 1e30, math.nan, math.inf])
dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]
)
tensors = st.tuples(shapes, dtypes, values).map(
    lambda t: torch.full(t[0], t[2] if t[1].is_floating_point else 1).to(t[1])
)
files = st.dictionaries(keys, tensors, max_size=8)
fuzz = settings(phases=[Phase.generate])


def check(model: Family, path: Path) -> None:
    """A file is read into numbers, or refused in a sentence."""
    try:
        with at_most(seconds=5):
            lora = model.read_lora(path)
    except LoRAError as error:
        assert_is_a_sentence(str(error), path, "")
        return
    parts = [pair for layers in (lora.layers, *lora.text_encoders.values()) for pair in layers.values()]
    assert parts and all(pair.A.isfinite().all() and pair.B.isfinite().all() for pair in parts)


@settings(fuzz, max_examples=600)
@given(tensors=files, good=st.booleans())
def test_any_tensors_are_read_or_refused(sdxl: Family, tmp_path: Path, tensors: dict[str, Tensor], good: bool) -> None:
    save_file(tensors | (GOOD if good else {}), tmp_path / "lora.safetensors")
    check(sdxl, tmp_path / "lora.safetensors")


@settings(fuzz, max_examples=300)
@given(place=st.integers(0, 2000), new=st.binary(min_size=1, max_size=8))
def test_any_bytes_of_a_file_may_be_wrong(sdxl: Family, tmp_path: Path, place: int, new: bytes) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(keyed(KOHYA_Q, pair(32, 32), KOHYA) | {f"{KOHYA_Q}.alpha": torch.tensor(1.0)}, path, {"trigger": "x"})
    whole = bytearray(path.read_bytes())
    whole[place : place + len(new)] = new
    path.write_bytes(whole)
    check(sdxl, path)


header_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8,
)  # fmt: skip
alphas = st.dictionaries(
    st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "unet.r", "unet.init_lora_weights"]),
    header_values, max_size=4,
)  # fmt: skip


@settings(fuzz, max_examples=300)
@given(said=alphas)
def test_any_metadata_is_read_or_refused(sdxl: Family, tmp_path: Path, said: dict[str, Any]) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(said), "ss_tag_frequency": json.dumps(said)}
    save_file(GOOD, tmp_path / "lora.safetensors", metadata)
    check(sdxl, tmp_path / "lora.safetensors")
