"""The servers that the suite speaks to: those that the environment names, else script/serve's on tiny bases.

    BASE_URL, TRAIN_BASE_URL   a server in predict and one in train mode: script/serve, `cog serve`, a container, a pod
    CONFORMANCE_BASES          the bases that they have, separated by commas; unset: sdxl,flux-dev
    CONFORMANCE_HOST           the tests' own host, by a name that both they and those servers know; unset: loopback
    CONFORMANCE_UPLOADS        the --upload-url with which the server at BASE_URL was started: http://HOST:PORT/FOLDER/,
                               HOST being CONFORMANCE_HOST and PORT one that the tests may listen on

A server does one thing at a time: give none to two runs at once. Here every worker has its own, and only
test_trainings.py trains, because both modes share a working directory, in which a training leaves its tar; who trains
beside it, as the browser's tests do, and who looks at that tar say trains_alone().
"""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from test_folder.conformance.client import PREDICT, TRAIN, Client, Mode
from test_folder.conformance.hooks import Hooks
from test_folder.conformance.local import Place, running

NAMED = bool(os.environ.get("BASE_URL") or os.environ.get("TRAIN_BASE_URL"))
UPLOADS = os.environ.get("CONFORMANCE_UPLOADS")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "local: looks at the files or processes of a server, which must run here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NAMED and item.get_closest_marker("local"):
            item.add_marker(pytest.mark.skip(reason="needs a server that runs here, and one was named"))


@pytest.fixture(scope="session")
def hooks() -> Iterator[Hooks]:
    host = os.environ.get("CONFORMANCE_HOST", "127.0.0.1")
    with Hooks(host, urlsplit(UPLOADS).port or 0 if UPLOADS else 0) as server:
        yield server


@pytest.fixture(scope="session")
def training_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="session")
def predictor(request: pytest.FixtureRequest) -> Client:
    """A server in predict mode."""
    return _named(PREDICT, "BASE_URL") if NAMED else request.getfixturevalue("predicting")


@pytest.fixture(scope="session")
def trainer(request: pytest.FixtureRequest, training_place: Place) -> Iterator[Client]:
    """A server in train mode."""
    if NAMED:
        yield _named(TRAIN, "TRAIN_BASE_URL")
        return
    with running(training_place.folder, _settings(request), train=True) as client:
        yield client


@pytest.fixture(scope="session")
def uploader(
    request: pytest.FixtureRequest, hooks: Hooks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A server in predict mode that uploads what it makes to hooks."""
    if NAMED:
        if not UPLOADS:
            pytest.skip("CONFORMANCE_UPLOADS does not say that the server uploads what it makes")
        yield _named(PREDICT, "BASE_URL")
        return
    settings = _settings(request) | {"KLORA_BASES": "sdxl"}
    with running(tmp_path_factory.mktemp("uploader"), settings, uploads=f"{hooks.url}/uploads/") as client:
        yield client


@pytest.fixture(params=["predictor", "trainer"], ids=["predict", "train"])
def server(request: pytest.FixtureRequest) -> Client:
    """Both modes, one after the other."""
    return request.getfixturevalue(request.param)


def _named(mode: Mode, variable: str) -> Client:
    url = os.environ.get(variable)
    if not url:
        pytest.skip(f"{variable} names no server")
    return Client(url.rstrip("/"), mode)


def _settings(request: pytest.FixtureRequest) -> dict[str, str]:
    bases: Path = request.getfixturevalue("bases")  # not built for a server that has its own
    return {"KLORA_MODELS": str(bases)}
