"""The controls of the page, by hand and by keys: what they begin, what they leave alone, and who can tell."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from test_folder.conformance.client import Client
from test_folder.playground.browsing import (
    ASKED,
    DIAL,
    IN_A_BROWSER,
    drag,
    drawing,
    drop,
    field,
    make,
    shown,
    style_share,
)

pytestmark = IN_A_BROWSER


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
