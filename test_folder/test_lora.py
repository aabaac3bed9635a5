"""A LoRA is data: the mapping of its layers, and what it remembers of where it was lent; a plan says when it acts."""

import copy
import pickle

import pytest
import torch

from klora.fusion import fuse
from klora.lora import LoRA, LowRank, Plan, Step, readable
from test_folder.files.reading import pair


def test_lora_is_the_mapping_of_its_denoiser_layers() -> None:
    layers = {name: LowRank(*pair(4, 5)) for name in "ba"}
    lora = LoRA(layers, {"text_encoder": {"x": LowRank(*pair(4, 5))}})
    assert dict(lora) == layers and list(lora) == ["b", "a"] and len(lora) == 2
    assert "x" not in lora and lora.get("x") is None


def test_loras_may_be_compared_though_tensors_cannot() -> None:
    first, second = (LoRA({"a": LowRank(*pair(4, 5))}) for _ in "ab")
    assert first == first and first != second and second in [first, second]
    assert fuse(first, second) != fuse(first, second)


def test_constant_plan_lets_every_lora_act_always_at_its_scale() -> None:
    first, second = ({name: LowRank(*pair(4, 5)) for name in names} for names in ("ab", "bc"))
    plan = Plan.constant((first, second), (0.5, -2.0))
    assert plan.layers == ("a", "b", "c")
    assert plan.loras == (first, second)
    assert torch.equal(plan.gates, torch.tensor([[[0.5, -2.0]] * 3]))


def test_a_step_that_is_sent_elsewhere_still_says_of_how_many() -> None:
    """A progress bar may be another process's."""
    for sent in (copy.deepcopy(Step(3, 10)), pickle.loads(pickle.dumps(Step(3, 10)))):
        assert (sent, sent.steps) == (3, 10)


def placeable(rows: int = 6) -> LoRA:
    generator = torch.Generator().manual_seed(rows)
    pair = LowRank(torch.randn(2, 4, generator=generator).half(), torch.randn(rows, 2, generator=generator).half())
    return LoRA({"a": pair})


def test_a_lora_moves_as_a_whole_and_knows_its_scores_there() -> None:
    lora = LoRA({"a": LowRank(*pair(4, 5))}, {"text_encoder": {"x": LowRank(*pair(4, 5))}})
    moved = lora.to(torch.device("meta"))
    there = moved["a"], moved.text_encoders["text_encoder"]["x"]
    assert all(factor.is_meta for one in there for factor in (one.A, one.B))
    assert moved.scores is lora.scores


def test_a_lora_remembers_where_it_was_last_and_nothing_older() -> None:
    lora, cpu = placeable(), torch.device("cpu")
    there = lora.placed(cpu, torch.float32)
    assert there["a"].A.dtype == there["a"].B.dtype == torch.float32
    assert torch.equal(there["a"].B, lora["a"].B.float()) and lora["a"].B.dtype == torch.float16
    assert lora.placed(cpu, torch.float32) is there
    elsewhere = lora.placed(cpu, torch.float64)
    assert elsewhere["a"].A.dtype == torch.float64
    assert lora.placed(cpu, torch.float32) is not there


def test_a_large_lora_is_placed_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, cpu = placeable(), torch.device("cpu")
    nbytes = 4 * (2 * 4 + 6 * 2)
    for most, kept in ((nbytes, True), (nbytes - 1, False)):
        monkeypatch.setattr("klora.lora.PLACED_BYTES", most)
        lora = placeable()
        assert (lora.placed(cpu, torch.float32) is lora.placed(cpu, torch.float32)) == kept


def test_a_pair_says_where_it_lies_and_where_kernels_read_it() -> None:
    stored = torch.arange(16.0)
    askew = LowRank(stored[1:9].view(4, 2).T, stored.view(4, 4)[:, :2].contiguous())
    lora_A, lora_B = askew.readable
    assert lora_B is askew.B and lora_A.is_contiguous() and lora_A.data_ptr() % 16 == 0
    assert torch.equal(lora_A, askew.A) and askew.readable[0] is lora_A
    assert readable(stored[1:9]).data_ptr() % 16 == 0 and torch.equal(readable(stored[1:9]), stored[1:9])
    assert askew.placement == (torch.device("cpu"), torch.float32)
    assert LowRank(askew.A, askew.B.half()).placement is None
