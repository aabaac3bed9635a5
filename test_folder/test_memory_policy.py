"""What stays in a GPU's memory and which engine runs, for cards of 24 to 141 GB: bases of the published sizes, a fake
reading of the memory, nothing loaded. docs/memory.md is held to it."""

import json
import re
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import klora.layers
import klora.studio.bases
from klora.errors import BaseModelError
from klora.models.linears import linear_shapes
from klora.studio import Studio
from klora.studio.bases import ResidentBases
from klora.training.config import TARGETS
from test_folder import published, tiny

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
DOC = (Path(__file__).resolve().parent.parent / "docs" / "memory.md").read_text()
FAMILY = {"sdxl": "sdxl", "illustrious-xl": "sdxl", "flux-dev": "flux", "flux-schnell": "flux"}
COMPONENT = {"sdxl": "unet", "flux": "transformer"}
CARDS = {
    "L4, 24 GB": 23_034,
    "L40S, 48 GB": 46_068,
    "A6000, 48 GB": 49_140,
    "H100, 80 GB": 81_559,
    "H200, 141 GB": 143_771,
}  # MiB, as drivers report
TAKEN = (600 << 20) + 1_219_000_000  # by CUDA itself, and by the safety checker in fp32

Modules = dict[str, dict[str, nn.Module]]


@pytest.fixture(scope="module")
def modules() -> Modules:
    """The published modules of each family in bf16, as shapes alone."""
    return {
        family: {part: published.random(build, "meta", BF16) for part, (_, build) in published.modules(name).items()}
        for family, name in COMPONENT.items()
    }


def sizes(parts: dict[str, nn.Module]) -> dict[str, int]:
    """Parameters by part."""
    return {part: sum(parameter.numel() for parameter in module.parameters()) for part, module in parts.items()}


def write_part(path: Path, count: int, kind: str) -> None:
    """A weight file of so many numbers that are not there: a hole in the disk."""
    width = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}[kind]
    header = json.dumps({"w": {"dtype": kind, "shape": [count], "data_offsets": [0, count * width]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * width)


@pytest.fixture(scope="module")
def folders(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of the published sizes, SDXL's in fp16, Illustrious XL one file, FLUX.1's in bf16, one in fp32, and one of
    whole numbers."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in (
        *((name, "F16" if "xl" in name else "BF16") for name in FAMILY),
        ("fp32", "F32"),
        ("int64", "I64"),
    ):
        counts = sizes(modules[FAMILY.get(name, "sdxl")])
        for part, count in {"": sum(counts.values())}.items() if name == "illustrious-xl" else counts.items():
            write_part(folder / name / part / "model.safetensors", count, kind)
    return folder


class Loaded:
    """What a Studio and the engines look at of a loaded base."""

    def __init__(self, parts: dict[str, nn.Module], component: str) -> None:
        self.pipe, self.denoiser = SimpleNamespace(components=parts), parts[component]
        self.component, self.inventory = component, {component: linear_shapes(parts[component])}
        self.host_bound = component == "unet"


class Card:
    """A GPU of so many MiB, and how much of it is free while the models that it has loaded live."""

    def __init__(self, total: int, modules: Modules) -> None:
        self._total, self._modules = (total << 20) - TAKEN, modules
        self._held: weakref.WeakKeyDictionary[Loaded, int] = weakref.WeakKeyDictionary()
        self.warmed = 0

    def warm_up(self, model: Loaded) -> None:
        """In warm_up's place."""
        assert model in self._held
        self.warmed += 1

    def free(self, device: torch.device) -> int:
        return self._total - sum(self._held.values())

    def load(self, family: str, path: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
        """In load_model's place."""
        parts = self._modules[family]
        needed = sum(sizes(parts).values()) * dtype.itemsize
        assert needed <= self.free(device), "on a real card this would be an error of CUDA's"
        model = Loaded(parts, COMPONENT[family])
        self._held[model] = needed
        return model


@pytest.fixture
def card(request: pytest.FixtureRequest, modules: Modules, monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card(request.param, modules)
    monkeypatch.setattr(klora.studio.bases, "load_model", card.load)
    monkeypatch.setattr(klora.studio.bases, "warm_up", card.warm_up)
    monkeypatch.setattr(klora.layers, "free_bytes", card.free)
    return card


def studio_of(card: Card) -> Studio:
    return Studio(lambda *_: ("", "", Path()), Path("no-checker"), CUDA, card.free)


def engine(model: Any, targets: str) -> str:
    """Of a LoRA that adapts these layers: attached()'s own choice, without lending anything."""
    names = [name for name in tiny.linear_shapes(model.denoiser) if re.search(TARGETS[targets], name)]
    fits = klora.layers._fits([model.denoiser.get_submodule(name) for name in names], [False] * len(names), 0)
    return "merged" if fits else "gated"


def named(folders: Path, *bases: str) -> Iterator[tuple[str, str, Path]]:
    return ((base, FAMILY[base], folders / base) for base in bases)


def on_each_card(cards: dict[str, int] = CARDS) -> Any:
    return pytest.mark.parametrize(("name", "card"), cards.items(), indirect=["card"], ids=cards)


@on_each_card()
def test_what_the_documentation_says_of_a_card_is_what_happens(name: str, card: Card, folders: Path) -> None:
    every = studio_of(card)
    every.prepare(named(folders, *FAMILY))
    cells = [", ".join(every.resident)]
    del every
    studio = studio_of(card)
    studio.prepare(named(folders, "sdxl", "flux-dev"))
    cells.insert(0, ", ".join(studio.resident))
    for asked in named(folders, "sdxl", "flux-dev"):
        try:
            cells += [engine(studio.load(*asked), targets) for targets in ("attention", "all")]
        except BaseModelError:
            cells += ["refused", "refused"]
    assert f"| {name} | {' | '.join(cells)} |" in DOC


def test_the_sizes_in_the_documentation_are_the_models(modules: Modules) -> None:
    for family, title in (("sdxl", "SDXL"), ("flux", "FLUX.1")):
        counted = sizes(modules[family])
        order = ("text_encoder", "text_encoder_2", "vae", COMPONENT[family])
        gigabytes = [f"{2 * counted[part] / 1e9:.2f}" for part in order] + [f"{2 * sum(counted.values()) / 1e9:.2f}"]
        assert f"| {title} | {' | '.join(gigabytes)} |" in DOC


@on_each_card({"24 GB": 23_034})
def test_what_can_never_fit_is_refused_in_a_sentence_and_costs_no_other_base_its_place(
    name: str, card: Card, folders: Path
) -> None:
    studio = studio_of(card)
    studio.prepare(named(folders, "sdxl"))
    with pytest.raises(BaseModelError) as error:
        studio.load("flux-dev", "flux", folders / "flux-dev")
    assert str(error.value) == (
        "flux-dev needs 33.7 GB of memory on cuda, where 22.3 GB can be had. "
        "Expected a larger device or a smaller base."
    )
    assert studio.resident == ["sdxl"]


@pytest.mark.parametrize("missing", [0, 1])
@on_each_card({"24 GB": 23_034})
def test_the_only_base_may_take_all_that_there_is(name: str, card: Card, folders: Path, missing: int) -> None:
    needed = sum(file.stat().st_size for file in (folders / "sdxl").rglob("*.safetensors"))
    bases = ResidentBases(CUDA, lambda device: needed - missing, compiled=None)
    with pytest.raises(BaseModelError, match=r"^sdxl needs 6\.9 GB") if missing else nullcontext():
        bases.load("sdxl", "sdxl", folders / "sdxl")


@on_each_card({"48 GB": 49_140})
def test_for_a_base_that_fits_nothing_is_let_go_and_for_another_first_what_can_be_spared(
    name: str, card: Card, folders: Path
) -> None:
    spared: list[list[str]] = []
    bases = ResidentBases(CUDA, card.free, compiled=None, spare=lambda: spared.append(bases.names))
    for base in ("sdxl", "flux-dev", "flux-schnell"):
        bases.load(base, FAMILY[base], folders / base)
    assert spared == [["sdxl", "flux-dev"]]


@on_each_card({"24 GB": 23_034})
def test_a_server_of_nothing_that_fits_is_not_ready(name: str, card: Card, folders: Path) -> None:
    with pytest.raises(BaseModelError, match=r"^flux-dev needs 33\.7 GB"):
        studio_of(card).prepare(named(folders, "flux-dev"))


@on_each_card({"48 GB": 49_140})
def test_set_up_loads_no_base_only_to_let_it_go_but_a_request_gets_the_one_that_it_asks_for(
    name: str, card: Card, folders: Path
) -> None:
    studio = studio_of(card)
    studio.prepare(named(folders, "flux-dev", "flux-schnell", "sdxl"))
    assert studio.resident == ["flux-dev", "sdxl"] and card.warmed == 2
    studio.load("flux-schnell", "flux", folders / "flux-schnell")
    assert studio.resident == ["sdxl", "flux-schnell"]


@on_each_card()
def test_blocks_are_compiled_at_set_up_for_the_engine_that_requests_will_have(
    name: str, card: Card, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before all is loaded that stays; and no request that loads a base waits for a compiler."""
    compiled: list[tuple[Any, str]] = []
    monkeypatch.setattr(
        klora.studio.bases, "compile_blocks", lambda model, **_: compiled.append((model, engine(model, "all")))
    )
    bases = ResidentBases(CUDA, card.free, compiled="own")
    bases.prepare(named(folders, "sdxl", "flux-dev"))
    loaded = {base: bases.load(base, FAMILY[base], folders / base) for base in bases.names}
    assert compiled == [(model, engine(model, "all")) for model in loaded.values()] != []
    bases.load("illustrious-xl", "sdxl", folders / "illustrious-xl")
    assert len(compiled) == len(loaded) == card.warmed


@pytest.mark.parametrize(("products", "capable", "expected"), [
    ("float8", True, {"sdxl": False, "flux-dev": True}),
    ("float8", False, {"sdxl": False, "flux-dev": False}),
    ("own", True, {"sdxl": False, "flux-dev": False}),
])  # fmt: skip
@on_each_card({"H100, 80 GB": CARDS["H100, 80 GB"]})
def test_products_are_in_float8_where_the_card_can_and_they_are_what_takes_the_time(
    name: str, card: Card, folders: Path, monkeypatch: pytest.MonkeyPatch, products: Any, capable: bool, expected: Any
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(klora.studio.bases, "compile_blocks", lambda model, float8: asked.append(float8))
    monkeypatch.setattr(klora.studio.bases, "has_float8", lambda device: capable)
    bases = ResidentBases(CUDA, card.free, compiled=products)
    bases.prepare(named(folders, *expected))
    assert dict(zip(bases.names, asked, strict=True)) == expected


@on_each_card({"13 GB": 13_000})
def test_a_base_counts_as_it_is_loaded_not_as_it_lies_on_the_disk(name: str, card: Card, folders: Path) -> None:
    """In fp32, 13.9 GB, it would be refused; in bf16 it takes half of that."""
    studio_of(card).prepare([("sdxl", "sdxl", folders / "fp32")])


@pytest.mark.parametrize(("base", "size"), [("sdxl", "13.9"), ("flux-dev", "67.5"), ("int64", "27.8")])
def test_on_a_cpu_halves_count_double(folders: Path, base: str, size: str) -> None:
    """SDXL's are in fp16, FLUX.1's in bf16. Whole numbers stay as they are."""
    studio = Studio(lambda *_: ("", "", Path()), Path("no-checker"), torch.device("cpu"), lambda device: 10**10)
    with pytest.raises(
        BaseModelError, match=rf"^{base} needs {re.escape(size)} GB of memory on cpu, where 10\.0 GB can be had\."
    ):
        studio.load(base, FAMILY.get(base, "sdxl"), folders / base)
