"""What a person has made at the playground, and what then is there: the server's own pictures, files and refusals."""

import json
import re
import socket
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from test_folder.conformance.client import Client
from test_folder.conformance.local import running, trains_alone
from test_folder.conformance.payloads import pictures, zipped
from test_folder.playground.browsing import (
    ADVICE,
    ASKED,
    IN_A_BROWSER,
    LORAS,
    ROOT,
    TOYS,
    drag,
    drawing,
    field,
    fill_in,
    make,
    opened,
    shown,
    style_share,
)

pytestmark = IN_A_BROWSER


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
