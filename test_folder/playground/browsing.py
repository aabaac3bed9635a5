"""A person at the playground in a real browser: the page, its form, its slider and its pictures.

Needs Chromium; script/playground installs the rest when it first runs.
"""

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

ROOT = Path(__file__).resolve().parents[2]
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

IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
"""The marks of its tests."""


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
