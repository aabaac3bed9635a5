"""The playground in a real browser, on the real server and the toy FLUX.1: what a person does, and what then is there.

Needs Chromium; script/playground installs the rest when it first runs.
"""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from test_folder.conformance.client import Client
from test_folder.conformance.local import running, trains_alone
from test_folder.conformance.payloads import pictures, zipped

ROOT = Path(__file__).resolve().parent.parent
TOYS = ROOT / "examples" / "toy"
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
SECONDS = 60  # for anything to come about; nothing waits so long when all is well
LORAS = {"content_lora": "flux-dev/robot.safetensors", "style_lora": "flux-dev/neon.safetensors"}
ASKED: dict[str, Any] = {
    "prompt": "a sbu robot, in szn style", **LORAS, "pattern": "s", "seed": 3, "num_inference_steps": 4,
    "output_format": "png", "disable_safety_checker": True,
}  # fmt: skip
ADVICE = "script/serve starts a server on this machine; --server names another."
PLACE = "slider => (slider.value - slider.min) / (slider.max - slider.min)"
DIAL = "#style-bias input[type=range]"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    environment = {"KLORA_MODELS": str(TOYS), "KLORA_LORA_ROOT": str(TOYS / "loras")}
    with running(tmp_path_factory.mktemp("server"), environment) as server:
        yield server


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Browser, called: list[str]) -> Iterator[BrowserContext]:
    """A browser that has seen nothing yet."""
    with browser.new_context(viewport={"width": 1400, "height": 1300}) as context:
        context.set_default_timeout(1000 * SECONDS)
        expect.set_options(timeout=1000 * SECONDS)
        context.on("request", lambda request: called.append(request.url))
        yield context


@pytest.fixture(scope="module")
def called() -> list[str]:
    """Every address that the page has called."""
    return []


@pytest.fixture(scope="module")
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


def opened(context: BrowserContext, address: str) -> Page:
    page = context.new_page()
    page.goto(address)
    page.click("#everything-else > button")
    return page


def fill_in(page: Page, **more: Any) -> None:
    """As a person would: what is in the visible part of the form, then what is in the other."""
    asked = ASKED | more
    for name in ("prompt", *LORAS):
        page.fill(field(name), asked[name])
    for name in ("seed", "num_inference_steps"):
        page.fill(field(name), str(asked[name]))
    page.check(f'#input-pattern input[value="{asked["pattern"]}"]')
    page.check(f'#input-output_format input[value="{asked["output_format"]}"]')
    page.check("#input-disable_safety_checker input")
    page.uncheck("#with-report input")


def field(name: str) -> str:
    """Where something is written in the form."""
    return f"#input-{name} :is(input, textarea)"


def drag(page: Page, share: float) -> None:
    """Move the slider to a share of its way, and let it go."""
    page.locator(DIAL).scroll_into_view_if_needed()
    box = page.locator(DIAL).bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + float(page.locator(DIAL).evaluate(PLACE)) * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], middle, steps=5)
    page.mouse.up()


def drop(page: Page, place: str, *files: Path) -> None:
    """Drag files or folders from elsewhere onto a place of the page, and let them go."""
    page.locator(place).scroll_into_view_if_needed()
    box = page.locator(place).bounding_box()
    assert box
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    dragged = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    chromium = page.context.new_cdp_session(page)
    for step in ("dragEnter", "dragOver", "drop"):
        chromium.send("Input.dispatchDragEvent", {"type": step, **at, "data": dragged})


def shown(page: Page, place: str) -> np.ndarray:
    """The pixels of a picture on the page, once it is there."""
    source = page.locator(f"{place} img").first.get_attribute("src")
    answer = page.request.get(str(source))
    assert answer.ok
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def style_share(page: Page, place: str) -> int:
    """In percent, as the bar beneath a picture says."""
    return int(re.findall(r"style (\d+) %", page.inner_text(f"{place}-meter"))[0])


@contextmanager
def drawing(page: Page) -> Iterator[None]:
    """Wait until what the block asks for is there, and not what was there before."""
    page.evaluate("for (const said of document.querySelectorAll('#standing .note')) said.textContent = ''")
    yield
    expect(page.locator("#standing .note")).to_contain_text("Done.")


def make(page: Page) -> np.ndarray:
    with drawing(page):
        page.click("#make")
    return shown(page, "#now")


def test_a_fusion_is_made_and_its_picture_is_the_servers(page: Page, server: Client) -> None:
    picture = make(page)
    assert picture.std() > 10, "it is blank"
    assert np.array_equal(picture, server.images(**ASKED)[0])


def test_the_slider_let_go_draws_again_with_more_style_and_keeps_the_picture_before(page: Page, server: Client) -> None:
    page.fill(field("seed"), "")  # a random one is kept, too
    first = make(page)
    seed = int(re.findall(r"seed (\d+)", page.inner_text("#now-meter"))[0])
    share = style_share(page, "#now")
    with drawing(page):
        drag(page, 0.75)
    assert np.array_equal(shown(page, "#before"), first)
    assert style_share(page, "#now") > share == style_share(page, "#before")
    value = float(re.findall(r"style_bias ([\d.]+)", page.inner_text("#now-meter"))[0])
    assert 1.9 < value < 2.1
    assert f"style_bias {value:g}" in page.inner_text("#dial")
    second = shown(page, "#now")
    assert not np.array_equal(second, first)
    assert np.array_equal(second, server.images(**ASKED | {"seed": seed, "style_bias": value})[0])


def test_the_slider_only_moves_where_it_is_not_to_draw(page: Page) -> None:
    make(page)
    page.uncheck("#again input")
    before = page.inner_text("#now-meter")
    drag(page, 0.25)
    expect(page.locator("#dial")).to_contain_text(re.compile(r"The subject counts [\d.]+ times. style_bias 0\.[45]"))
    page.wait_for_timeout(300)
    assert page.locator("#standing progress").count() == 0
    assert page.inner_text("#now-meter") == before


def test_keys_let_the_slider_go_as_a_hand_does(page: Page) -> None:
    first, share = make(page), style_share(page, "#now")
    page.focus(DIAL)
    with drawing(page):
        for _ in range(10):
            page.keyboard.press("ArrowRight")
    assert np.array_equal(shown(page, "#before"), first)
    assert style_share(page, "#now") > share
    assert "style_bias 1.41" in page.inner_text("#now-meter")


def test_a_field_beside_a_slider_that_is_passed_by_begins_nothing_anew(page: Page) -> None:
    make(page)
    page.fill(field("num_inference_steps"), "500")
    page.click("#make")
    expect(page.locator("#standing")).to_contain_text(re.compile(r"Step \d\d+ of 500"))
    page.focus("#input-style_scale input[type=range]")
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
    page.wait_for_timeout(500)
    expect(page.locator("#standing")).to_have_text(re.compile(r"Step \d\d+ of 500"), timeout=1)
    page.click("#cancel")
    expect(page.locator("#standing")).to_have_text("Cancelled.")


def test_a_field_beside_a_slider_that_is_left_blank_or_out_of_bounds_is_filled(page: Page) -> None:
    scale = page.locator("#input-content_scale input[type=number]")
    make(page)
    with drawing(page):
        scale.fill("7")
        scale.press("Tab")
    expect(scale).to_have_value("3")
    with drawing(page):
        scale.fill("")
        scale.press("Tab")
    expect(scale).to_have_value("1")


def test_what_has_the_focus_is_seen_and_how_a_request_ends_is_read_out(page: Page) -> None:
    page.focus(field("prompt"))
    for _ in range(30):
        page.keyboard.press("Tab")
        outlined = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid 3px" in outlined, page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("document.activeElement.id") == "cancel":
            break
    for place in ("#standing", "#dial .said"):
        assert page.locator(place).first.evaluate(
            "e => (e.closest('[aria-live]') ?? e.querySelector('[aria-live]')).ariaLive"
        ) == "polite"  # fmt: skip


def test_arrows_move_among_the_choices_of_a_question_and_tab_passes_them(page: Page, server: Client) -> None:
    page.focus('#input-pattern input[value="s"]')
    page.keyboard.press("ArrowRight")
    picture = make(page)
    assert np.array_equal(picture, server.images(**ASKED | {"pattern": "s*"})[0])
    page.focus('#input-pattern input[value="s*"]')
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.name").startswith("input-fusion")


def test_a_picture_is_a_button_with_a_name_and_nothing_moves_for_who_wants_that(page: Page) -> None:
    make(page)
    expect(page.locator("#now").get_by_role("button", name="Now", exact=True)).to_be_visible()
    page.emulate_media(reduced_motion="reduce")
    page.focus(DIAL)
    page.click("#everything-else > button")
    page.click("#everything-else > button")
    assert page.evaluate("document.getAnimations().length") == 0
    page.emulate_media(reduced_motion="no-preference")


@pytest.mark.parametrize("dropped", [("a.txt", "b.txt"), ("",)], ids=["two", "folder"])
def test_what_is_dropped_is_one_file(page: Page, tmp_path: Path, dropped: tuple[str, ...]) -> None:
    (tmp_path / "a.txt").write_text("a sbu robot\n")
    (tmp_path / "b.txt").write_text("a sbu flower\n")
    said: list[str] = []
    page.once("dialog", lambda dialog: (said.append(dialog.message), dialog.accept()))
    drop(page, "#input-prompts", *(tmp_path / name for name in dropped))
    assert said == ["Expected one file, and no folder."]
    drop(page, "#input-prompts", tmp_path / "a.txt")
    expect(page.locator("#input-prompts")).to_contain_text("12.0")
    page.click("#input-prompts button[aria-label=Clear]")


def test_the_sum_is_shown_whatever_the_slider_says(page: Page, server: Client) -> None:
    page.uncheck("#again input")
    drag(page, 0.75)
    page.check('#input-fusion input[value="sum"]')
    picture = make(page)
    page.check('#input-fusion input[value="klora"]')
    assert np.array_equal(picture, server.images(**{**ASKED, "fusion": "sum", "pattern": "auto"})[0])


def test_what_the_server_refuses_is_said_in_its_words_and_the_next_request_is_right(page: Page, server: Client) -> None:
    page.fill(field("style_lora"), "nowhere.safetensors")
    page.click("#make")
    sentence = server.refusal(**ASKED | {"style_lora": "nowhere.safetensors"})
    expect(page.locator("#standing [role=alert]")).to_have_text(sentence)
    page.fill(field("style_lora"), LORAS["style_lora"])
    assert np.array_equal(make(page), server.images(**ASKED)[0])


def test_progress_is_told_and_cancel_frees_the_server(page: Page, server: Client) -> None:
    page.fill(field("num_inference_steps"), "500")
    page.click("#make")
    expect(page.locator("#standing")).to_contain_text(re.compile(r"Step \d+ of 500"))
    page.click("#cancel")
    expect(page.locator("#standing")).to_have_text("Cancelled.")
    server.wait_until_ready()


def test_a_tab_that_is_closed_leaves_nothing_running(context: BrowserContext, address: str, server: Client) -> None:
    page = opened(context, address)
    fill_in(page, num_inference_steps=500)
    page.click("#make")
    expect(page.locator("#standing")).to_contain_text("of 500")
    page.close()
    server.wait_until_ready()


def test_two_tabs_get_their_own(page: Page, context: BrowserContext, address: str, server: Client) -> None:
    other = opened(context, address)
    fill_in(other, seed=4)
    with drawing(page), drawing(other):
        page.click("#make")
        other.click("#make")
    assert np.array_equal(shown(page, "#now"), server.images(**ASKED)[0])
    assert np.array_equal(shown(other, "#now"), server.images(**ASKED | {"seed": 4})[0])
    other.close()


def test_the_heat_map_and_the_sheets_have_places_of_their_own(page: Page) -> None:
    page.check("#with-report input")
    page.fill(field("num_inference_steps"), "2")
    picture = make(page)
    assert picture.shape == (128, 128, 3)
    assert shown(page, "#heat-map").shape[1] > 500
    with page.expect_download() as download:
        page.click("#table")
    assert download.value.suggested_filename == "klora_3_2.json"
    assert b"gamma" in Path(download.value.path()).read_bytes()
    page.uncheck("#with-report input")
    with drawing(page):
        drag(page, 0.6)
    for view in ("compare", "sweep"):
        with drawing(page):
            page.click(f"#{view}")
        expect(page.locator("#sheet")).to_contain_text(page.inner_text(f"#{view}"))
        sheet = shown(page, "#sheet")
        assert sheet.shape[1] > 4 * sheet.shape[0]
    assert np.array_equal(shown(page, "#before"), picture)


def test_a_file_of_prompts_comes_back_as_a_tar_whose_images_are_shown(page: Page, tmp_path: Path) -> None:
    """Also where the heat map is asked for, of which a file of prompts has none. The slider makes none anew."""
    make(page)
    (tmp_path / "prompts.txt").write_text("a sbu robot\na sbu flower\n")
    page.check("#with-report input")
    page.fill(field("prompt"), "{}, in szn style")
    page.set_input_files("#input-prompts input[type=file]", tmp_path / "prompts.txt")
    with drawing(page):
        page.click("#make")
    drag(page, 0.6)
    page.wait_for_timeout(300)
    assert "All are in the tar" in page.inner_text("#standing")
    page.click("#input-prompts button[aria-label=Clear]")
    with page.expect_download() as download:
        page.click("#images-tar")
    with tarfile.open(download.value.path()) as tar:
        named = [name for name in tar.getnames() if name.endswith(".png")]
        first = tar.extractfile(named[0])
        assert first and np.array_equal(shown(page, "#gallery"), np.asarray(Image.open(first).convert("RGB")))
    assert named == ["00000.png", "00001.png"]


def test_the_form_is_the_servers(page: Page, server: Client) -> None:
    inputs = server.call("GET", "/openapi.json")[1]["components"]["schemas"]["Input"]["properties"]
    buttons = {"style_bias": "#style-bias", "report": "#with-report", "compare": "#compare", "sweep": "#sweep"}
    for name, said in inputs.items():
        place = page.locator(buttons.get(name, f"#input-{name}"))
        assert place.count() == (0 if said.get("deprecated") else 1), name
        if said.get("x-cog-secret"):
            assert place.locator("input").get_attribute("type") == "password"
        elif name not in buttons and place.count():
            assert said["description"].replace("*", "∗") in place.inner_text(), name
    expect(page.locator(field("seed"))).to_have_attribute("placeholder", "0 to 4294967295")


def test_a_lora_is_trained_and_fused(page: Page, tmp_path: Path) -> None:
    archive = tmp_path / "pictures.zip"
    archive.write_bytes(zipped(*pictures()))
    with trains_alone(), running(tmp_path / "trainer", {"KLORA_MODELS": str(TOYS)}, train=True) as trainer:
        page.click("button[role=tab]:has-text('Train')")
        page.fill("#trainer :is(input, textarea)", trainer.url)
        page.set_input_files("#input-input_images input[type=file]", archive)
        page.check('#input-base_model input[value="flux-dev"]')
        page.fill(field("steps"), "1")
        page.fill(field("resolution"), "64")
        page.click("#every-setting > button")
        page.fill(field("sample_steps"), "1")
        page.click("#train")
        expect(page.locator("#training-standing")).to_contain_text("Done.")
    assert page.locator("#samples img").count() > 0
    with page.expect_download() as download:
        page.click("#tar")
    assert download.value.suggested_filename == "lora_subject_0.tar"
    page.click("#use-content_lora")
    page.click("button[role=tab]:has-text('Fuse')")
    expect(page.locator(field("content_lora"))).to_have_value(re.compile("trained here: "))
    assert make(page).std() > 10


def test_the_page_calls_nobody_else_and_keeps_no_token(page: Page, address: str, called: list[str]) -> None:
    page.fill("#input-hf_api_token input", "s3cret")
    make(page)
    page.fill("#input-hf_api_token input", "")
    assert len(called) > 20
    assert "s3cret" not in json.dumps(page.context.storage_state(indexed_db=True))
    assert [url for url in called if not url.startswith((address, "data:", "blob:"))] == []


def test_where_no_server_answers_a_sentence_says_what_starts_one() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        ended = subprocess.run([ROOT / "script" / "playground", "--server", url], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == f"{url} does not answer: ConnectionError. {ADVICE}\n"
