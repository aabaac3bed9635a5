"""What tests stand on: one thread, no network, tiny bases built once a session, and authorities on loopback."""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import diffusers
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from klora.models import load_model
from klora.models.family import Family
from klora.sources.deadline import Deadline
from klora.sources.network import Network
from test_folder import tiny
from test_folder.conformance.client import Client
from test_folder.conformance.local import Place, running
from test_folder.fakes import Server, Storage, network
from test_folder.lending import CONTENT, STYLE, Clock, Shop, hub, opened_shop

# What a shell starts in the background ignores interruptions, which tests send to their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # models this small are fastest so, and tests of two processes do not fight over cores
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
settings.register_profile(
    "seeded", derandomize=True, deadline=None,  # and nothing of the machine's load, or of what failed before, decides
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("seeded")
gc.disable()  # until all is imported, of which nothing is garbage


# What takes longest, longest first. A process that has nothing left takes the next file (--dist loadfile), so that a
# long file at the end would keep one of them busy while the others wait.
LONG = (
    "test_trainings", "test_training", "test_toy", "test_job", "test_taken_up", "test_job_ends", "test_cost",
    "test_equivalence", "test_pure_images", "test_cluster", "test_compiled_blocks", "test_make_toy_bases", "test_bench",
    "test_cli", "test_remote_requests", "test_predict", "test_download_weights", "test_report_command",
    "test_reproduction", "test_exported_file", "test_variants", "test_succession", "test_tiny", "test_inspection",
    "test_architecture", "test_sheets", "test_resident_bases",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and the collector, which every training calls, need not look through it."""
    gc.enable()
    gc.collect()
    gc.freeze()


class Together(LoadFileScheduling):
    """A file at a time to each process, but whole to one what shares a thing that takes long to make: servers, or the
    regression that tells styles."""

    def _split_scope(self, nodeid: str) -> str:
        folder, _, file = nodeid.partition("::")[0].rpartition("/")
        if folder.endswith("/conformance") or file == "test_predict.py":
            return "conformance"
        return "likeness" if file in ("test_toy.py", "test_likeness.py", "test_evaluate.py") else f"{folder}/{file}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like KLORA_MODELS, with every base, tiny and random."""
    return tiny.build_bases(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def families(bases: Path) -> dict[str, Family]:
    """A tiny base of each."""
    return {family: load_model(family, bases / base, torch.device("cpu")) for family, base in tiny.BASES.items()}


@pytest.fixture(scope="session")
def loras(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with content and style LoRAs, {sdxl,flux}_{content,style}.safetensors, ranks 4 and 8."""
    folder = tmp_path_factory.mktemp("loras")
    for family, base, component in (("sdxl", "sdxl", "unet"), ("flux", "flux-dev", "transformer")):
        model = getattr(diffusers.DiffusionPipeline.from_pretrained(bases / base), component)
        for seed, (role, rank) in enumerate((("content", 4), ("style", 8))):
            layers = tiny.random_lora(tiny.linear_shapes(model), rank, seed=seed)
            tiny.save_lora(folder / f"{family}_{role}.safetensors", layers, prefix=component)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Of the server that predicting is."""
    return Place(tmp_path_factory.mktemp("predictor"))


@pytest.fixture(scope="session")
def predicting(bases: Path, loras: Path, place: Place) -> Iterator[Client]:
    """script/serve in predict mode, on the tiny bases, with those LoRAs."""
    with running(place.folder, {"KLORA_MODELS": str(bases), "KLORA_LORA_ROOT": str(loras)}) as client:
        yield client


@pytest.fixture(scope="session")
def few_points() -> Iterator[None]:
    """The loss is compared at two points instead of eight, which take a third of a training of three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("klora.training.draw.FIXED_POINTS", 2)
        yield


@pytest.fixture
def deadline() -> Iterator[Deadline]:
    """One that is not meant to come."""
    with Deadline(20) as deadline:
        yield deadline


@pytest.fixture
def storage() -> Iterator[Storage]:
    """Where the authority of a test keeps its files."""
    with Storage() as storage:
        yield storage


@pytest.fixture
def net(authority: Server, storage: Storage) -> Network:
    """The way to a test's own authority and to its storage."""
    return network(authority, storage)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A cache, and a content and a style LoRA to be had by everybody."""
    with opened_shop(tmp_path / "cache") as shop:
        shop.authority.has(hub("content"), ("content.safetensors", CONTENT))
        shop.authority.has(hub("style"), ("style.safetensors", STYLE))
        yield shop


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds pass for the cache, by both clocks."""

    def pass_(seconds: float) -> None:
        wall, running = time.time, time.monotonic
        monkeypatch.setattr("klora.cache.refs.time", Clock(lambda: wall() + seconds, lambda: running() + seconds))
        monkeypatch.setattr("klora.cache.refusals.time", Clock(time.time, lambda: running() + seconds))

    return pass_


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    """Torch's default dtype, as it is while a library makes a model in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
