"""The real server on the toy FLUX.1, the playground on it, and a browser, for all tests of this folder."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from test_folder.conformance.client import Client
from test_folder.conformance.local import running
from test_folder.playground.browsing import CHROMIUM, FLAGS, ROOT, SECONDS, TOYS, drag, fill_in, opened


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    environment = {"KLORA_MODELS": str(TOYS), "KLORA_LORA_ROOT": str(TOYS / "loras")}
    with running(tmp_path_factory.mktemp("server"), environment) as server:
        yield server


@pytest.fixture(scope="package")
def address(server: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the playground on that server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, ROOT / "script" / "playground", "--server", server.url, "--port", str(port)]
    log = tmp_path_factory.mktemp("playground") / "log"
    with log.open("w") as lines:
        page = subprocess.Popen(program, stdout=lines, stderr=lines)
    while "Running on" not in log.read_text():
        assert page.poll() is None, log.read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/"
    page.terminate()
    page.wait(timeout=20)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def context(browser: Browser, called: list[str]) -> Iterator[BrowserContext]:
    """A browser that has seen nothing yet."""
    with browser.new_context(viewport={"width": 1400, "height": 1300}) as context:
        context.set_default_timeout(1000 * SECONDS)
        expect.set_options(timeout=1000 * SECONDS)
        context.on("request", lambda request: called.append(request.url))
        yield context


@pytest.fixture(scope="package")
def called() -> list[str]:
    """Every address that the page has called."""
    return []


@pytest.fixture(scope="package")
def tab(context: BrowserContext, address: str) -> Page:
    """Opened once: that takes longer than a picture."""
    return opened(context, address)


@pytest.fixture
def page(tab: Page) -> Page:
    """A tab with its form filled in, its slider in the middle, without the heat map, which takes time."""
    fill_in(tab)
    tab.uncheck("#again input")
    drag(tab, 0.5)
    tab.check("#again input")
    return tab
