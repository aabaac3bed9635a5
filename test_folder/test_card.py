"""What is told of a LoRA: the sheet of its samples, probed by colour; the card; the upload, to a hub on 127.0.0.1."""

import base64
import json
import logging
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import numpy
import pytest
from PIL import Image, ImageColor

import weights
from klora.errors import RequestError
from klora.training import card
from klora.training.publishing import Publishing

TOKEN, MACHINES_TOKEN, REPO = "hf_givenByTheUser", "hf_thisMachinesOwn", "someone/a-dog"
PAGE = f"https://huggingface.co/{REPO}"  # what the library turns into an address of the endpoint
REGULAR = {"uploadMode": "regular", "shouldIgnore": False}
STEPS = [("repos/create", status) for status in (401, 403, 413)] + [("commit/main", s) for s in (401, 403, 404, 409)]
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")
PLAIN = partial(Image.new, "RGB")
FACTS = {
    "lora_type": "subject", "trigger": "sbu", "prompt": "a sbu dog", "base": "sdxl", "rank": 8, "steps": 700,
    "repository": weights.BASES["sdxl"].repository, "learning_rate": 5e-5, "dataset": "5eed" * 16, "pictures": 5,
    "layers_to_optimize_regex": "to_q|to_k", "seed": 7, "batch_size": 2, "resolution": "512,768",
}  # fmt: skip


def boxes(sheet: Image.Image) -> dict[str, tuple[int, ...]]:
    pixels = numpy.asarray(sheet)
    places = {colour: (pixels == ImageColor.getrgb(colour)).all(-1).nonzero() for colour in COLOURS}
    return {name: (min(x), min(y), max(x) + 1, max(y) + 1) for name, (y, x) in places.items() if len(x)}


def darkest(sheet: Image.Image, *box: int) -> int:
    return sheet.convert("L").crop(box).getextrema()[0]


def test_every_picture_has_its_shape_and_its_place_within_even_margins() -> None:
    shapes = ((512, 512), (512, 256), (64, 64), (40, 64), (300, 200), (256, 1024))
    pictures = [PLAIN(shape, colour) for colour, shape in zip(COLOURS, shapes, strict=True)]
    sheet = card.contact_sheet([("step 1", pictures[:3]), ("step 2", pictures[3:])], ["a", "b", "c"])
    found = [boxes(sheet)[colour] for colour in COLOURS]
    sizes = [(384, 384), (384, 192), (192, 192), (120, 192), (300, 200), (96, 384)]
    assert [(box[2] - box[0], box[3] - box[1]) for box in found] == sizes
    assert all(left[2] < right[0] for row in (found[:3], found[3:]) for left, right in pairwise(row))
    assert all(above[3] < below[1] for above in found[:3] for below in found[3:])
    assert all(abs(found[at][0] + found[at][2] - found[at + 3][0] - found[at + 3][2]) <= 2 for at in range(3))
    (width, height), edge = sheet.size, card.MARGIN
    assert (width - max(box[2] for box in found), height - max(box[3] for box in found)) == (edge, edge)
    assert darkest(sheet, 0, 0, width, edge) == darkest(sheet, 0, 0, edge, height) == 255


def test_a_tiny_picture_is_enlarged_by_a_whole_factor_with_its_pixels_kept() -> None:
    board = PLAIN((100, 100), "blue")
    board.paste("red", (0, 0, 1, 1))
    edge, found = card.MARGIN, boxes(card.contact_sheet([("", [board])], [""]))
    assert found == {"blue": (edge, edge, edge + 200, edge + 200), "red": (edge, edge, edge + 2, edge + 2)}


def test_a_thin_picture_is_never_made_of_no_width_and_a_grey_one_is_rgb() -> None:
    thin = card.fitted(Image.new("L", (1, 1000)))
    assert (thin.mode, thin.size) == ("RGB", (1, card.LARGEST))


def test_a_large_picture_is_made_small_without_losing_every_other_line() -> None:
    stripes = Image.fromarray(numpy.tile(numpy.uint8([0, 255]), (768, 384)))
    assert all(100 < level < 156 for level in card.fitted(stripes).getpixel((200, 200)))


def test_a_missing_picture_leaves_its_cell_white_and_its_place_taken() -> None:
    first, second, third = (PLAIN((200, 200), colour) for colour in COLOURS[:3])
    sheet = card.contact_sheet([("1", [first, None]), ("2", [second, third]), ("3", [])], ["a", "b"])
    red, blue = boxes(sheet)["red"], boxes(sheet)["blue"]
    assert darkest(sheet, blue[0], red[1], sheet.width, red[3]) == 255
    assert darkest(sheet, red[0], blue[3], *sheet.size) == 255
    assert sheet.height - blue[3] >= card.MARGIN + card.SMALLEST


@pytest.mark.parametrize("title", ["dog", "a sbu dog in a bucket " * 20, "x" * 5000])
def test_titles_stay_above_their_column_and_labels_left_of_their_row(title: str) -> None:
    sheet = card.contact_sheet([(title, [PLAIN((192, 192), "red"), PLAIN((192, 192), "blue")])], [title, ""])
    red, blue = boxes(sheet)["red"], boxes(sheet)["blue"]
    assert darkest(sheet, red[0], 0, red[2], red[1]) < 64
    assert darkest(sheet, 0, red[1], red[0], red[3]) < 64
    assert darkest(sheet, blue[0], 0, blue[2], blue[1]) == 255  # it has no title
    assert darkest(sheet, red[0] - card.GAP + 2, 0, red[0] - 1, sheet.height) == 255
    assert red[1] <= card.MARGIN + card.LINES * card.LEADING + card.GAP


def test_a_title_that_does_not_fit_ends_in_an_ellipsis() -> None:
    lines = card._wrapped("a sbu dog in a bucket " * 20, font := card.ImageFont.load_default(card.TEXT), 200)
    assert (len(lines), lines[0], lines[-1][-1]) == (card.LINES, "a sbu dog in a bucket a", "…")
    assert 180 < font.getlength(lines[-1]) <= 200


def read(base: str = "sdxl", samples: tuple[str, ...] = (), **facts: object) -> huggingface_hub.ModelCard:
    entry = weights.BASES[base]
    known = FACTS | {"base": base, "repository": entry.repository, "checkpoint": entry.checkpoint} | facts
    return huggingface_hub.ModelCard(card.model_card(known, entry.licence, samples))


def test_the_front_matter_says_what_the_lora_is_and_shows_its_samples() -> None:
    data = read().data
    assert (data.base_model, data.license, data.instance_prompt) == (FACTS["repository"], "openrail++", "a sbu dog")
    assert {"lora", "text-to-image", "diffusers", "k-lora", "sdxl", "dreambooth"} == set(data.tags)
    assert data.get("widget") is None and "<Gallery />" not in read().text
    shown = read(samples=("samples/1.png", "samples/2.png"))
    urls = [entry["output"]["url"] for entry in shown.data.widget]
    assert urls == ["samples/1.png", "samples/2.png"] and "<Gallery />" in shown.text


def test_the_licence_of_flux_dev_is_named_and_linked() -> None:
    flux = read("flux-dev")
    assert (flux.data.license, flux.data.license_name) == ("other", "flux-1-dev-non-commercial-license")
    assert flux.data.license_link == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert "FLUX.1 [dev] is non-commercial" in flux.text and "flux" in flux.data.tags
    assert "non-commercial" not in read().text and "non-commercial" not in read("flux-schnell").text
    assert (read("flux-schnell").data.license, read("illustrious-xl").data.license) == ("apache-2.0", "openrail++")


def test_a_licence_that_is_nobodys_known_one_leads_to_the_base() -> None:
    data = huggingface_hub.ModelCard(card.model_card(FACTS | {"repository": "a/base"}, "Our Own, v. 2")).data
    assert (data.license_name, data.license_link) == ("our-own-v-2", "https://huggingface.co/a/base")


@pytest.mark.parametrize(("kind", "role"), [("subject", "content_lora"), ("style", "style_lora")])
def test_the_use_in_klora_follows_the_kind(kind: str, role: str) -> None:
    text = read(lora_type=kind, trigger="zwx").text
    assert role in text and f"`zwx`: a {kind} LoRA" in text and "lora_kohya.safetensors" in text
    assert ({"content_lora", "style_lora"} - {role}).pop() not in text


def test_the_settings_are_a_table() -> None:
    table = dict(re.findall(r"^\| (\w+) \| `(.*)` \|$", read(snr_gamma=None, class_word="").text, re.MULTILINE))
    expected = {name: str(FACTS[name]).replace("|", r"\|") for name in FACTS.keys() & set(card.SETTINGS)}
    assert table == expected and len(table) == 10


def test_the_card_holds_no_caption_no_file_name_and_no_token() -> None:
    private = {"captions": ["my own child"], "hf_token": TOKEN, "files": "IMG_1.jpg", "sample_prompts": "my own child"}
    assert read(**private).content == read().content


@pytest.mark.parametrize("prompt", ["a sbu dog", "a \"sbu\" 'dog' `x` {y} | \\n", "a\n```\n---\nsbu: dog"])
def test_the_diffusers_code_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    text = read("flux-dev", prompt=prompt, hf_repo_id=REPO)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text.text, re.MULTILINE | re.DOTALL)
    monkeypatch.setitem(sys.modules, "diffusers", diffusers := MagicMock())
    exec(compile(code, "README.md", "exec"), {})
    loaded = diffusers.DiffusionPipeline.from_pretrained
    assert loaded.call_args.args == ("black-forest-labs/FLUX.1-dev",)
    assert str(loaded.call_args.kwargs["torch_dtype"]) == "torch.bfloat16"
    pipeline = loaded.return_value.to.return_value
    pipeline.load_lora_weights.assert_called_once_with(REPO, weight_name="lora.safetensors")
    assert pipeline.call_args.args == (text.data.instance_prompt,) == (" ".join(prompt.split()),)


def test_the_diffusers_code_loads_a_base_of_one_file_from_that_file() -> None:
    where = "https://huggingface.co/OnomaAIResearch/Illustrious-XL-v1.0/blob/main/Illustrious-XL-v1.0.safetensors"
    text = read("illustrious-xl").text
    assert "from diffusers import StableDiffusionXLPipeline\n" in text
    assert f'= StableDiffusionXLPipeline.from_single_file("{where}", torch_dtype=torch.float16)' in text


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refusals: dict[str, int] = {}  # the status by step; such an answer quotes the token, as the worst hub may
        self.asked: dict[str, tuple[str | None, list[Any]]] = {}  # Authorization and body by step
        self.private = True  # the repository of this name
        self.addresses: set[tuple[str, int]] = set()  # that this process looked up


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        step, token = self.path.removeprefix("/api/").removeprefix(f"models/{REPO}/"), self.headers["Authorization"]
        body = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"] or 0)).splitlines()]
        self.server.asked[step] = token, body
        files = [file | REGULAR for file in (body or [{}])[0].get("files", ())]
        answer = {"url": PAGE, "commitOid": "0", "commitUrl": PAGE, "files": files}
        answer |= {"id": REPO, "private": self.server.private}
        self.send_response(status := self.server.refusals.get(step, 200))
        self.end_headers()
        self.wfile.write(json.dumps(answer | ({"error": f"Not with {token}"} if status != 200 else {})).encode())

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub, look_up = Hub(), socket.getaddrinfo
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    huggingface_hub.close_session()  # of another hub
    monkeypatch.setattr(card, "HfApi", partial(huggingface_hub.HfApi, endpoint=hub.url))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", MACHINES_TOKEN)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: hub.addresses.add(a[:2]) or look_up(*a, **k))
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "samples").mkdir()
    for name in ("lora.safetensors", "run.safetensors", "samples/run.safetensors", "samples/1.png"):
        (tmp_path / name).write_bytes(bytes(range(256)) + name.encode())
    (tmp_path / "README.md").write_text(card.model_card(FACTS, weights.BASES["sdxl"].licence))
    return tmp_path


def refusal(call: Callable[..., object], *given: object) -> str:
    with pytest.raises(RequestError) as error:
        call(*given)
    assert "hf_given" not in (logged := "".join(traceback.format_exception(error.value))) and "hf_this" not in logged
    return re.fullmatch("hf_repo_id is .* Expected .*", str(error.value)).group()


@pytest.mark.parametrize("refusals", [{}, {"repos/create": 409}], ids=["new", "there"])
def test_all_but_the_resume_state_arrives_byte_for_byte(hub: Hub, folder: Path, refusals: dict[str, int]) -> None:
    hub.refusals = refusals
    assert card.push(folder, REPO, TOKEN) == f"{hub.url}/{REPO}"
    files = [line["value"] for line in hub.asked["commit/main"][1][1:]]  # behind the message
    wanted = {name: (folder / name).read_bytes() for name in ("README.md", "lora.safetensors", "samples/1.png")}
    assert {file["path"]: base64.b64decode(file["content"]) for file in files} == wanted
    assert {token for token, _ in hub.asked.values()} == {f"Bearer {TOKEN}"}
    assert hub.addresses == {hub.server_address}


@pytest.mark.parametrize(("given", "made"), [((), "private"), ((True,), "private"), ((False,), "public")])
def test_the_repository_is_private_unless_asked_otherwise(hub: Hub, folder: Path, given: Any, made: str) -> None:
    card.push(folder, REPO, TOKEN, *given)
    (body,) = hub.asked["repos/create"][1]
    assert (f"{body['organization']}/{body['name']}", body["visibility"]) == (REPO, made)


def test_what_is_published_is_as_private_as_was_asked_and_shows_no_token(hub: Hub, folder: Path) -> None:
    publishing = Publishing(hf_repo_id=REPO, hf_token=TOKEN, hf_private=False)
    publishing.push(folder)
    assert hub.asked["repos/create"][1][0]["visibility"] == "public" and TOKEN not in repr(publishing)


def test_a_public_repository_that_is_there_gets_nothing_that_was_meant_to_be_private(hub: Hub, folder: Path) -> None:
    hub.private, hub.refusals = False, {"repos/create": 409}
    assert refusal(card.push, folder, REPO, TOKEN) == (
        f"hf_repo_id is '{REPO}', which is public, and hf_private is true. "
        "Expected a private repository, or hf_private=false."
    )
    assert hub.asked.keys() == {"repos/create", f"models/{REPO}"}
    assert card.push(folder, REPO, TOKEN, False) == f"{hub.url}/{REPO}"


@pytest.mark.parametrize(("step", "status"), STEPS)
def test_a_refusal_is_told_without_the_token(hub: Hub, folder: Path, step: str, status: int) -> None:
    hub.refusals = {step: status, f"models/{REPO}": status}
    assert f"hf_repo_id is '{REPO}', but the hub refused it ({status}). " in refusal(card.push, folder, REPO, TOKEN)


@pytest.mark.parametrize("step", [None, "commit/main"])
def test_the_hubs_libraries_log_no_address_for_a_signed_one_is_a_key(
    hub: Hub, folder: Path, step: str | None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    hub.refusals = {step: 500, f"models/{REPO}": 500} if step else {}
    with suppress(RequestError):
        card.push(folder, REPO, TOKEN)
    assert caplog.messages == [] and "127.0.0.1" not in capfd.readouterr().err
    logging.getLogger("huggingface_hub").warning("heard again")
    assert caplog.messages == ["heard again"]


def test_a_hub_out_of_reach_is_told_without_the_token(hub: Hub, folder: Path) -> None:
    hub.shutdown()
    hub.server_close()
    assert "the upload broke off (ConnectError)" in refusal(card.push, folder, REPO, TOKEN)


@pytest.mark.parametrize("token", [" ", f"{TOKEN}\n", f"{TOKEN} {TOKEN}", f"{TOKEN}é"])
def test_a_token_that_no_header_can_carry_is_refused_before_anything_is_trained(token: str) -> None:
    assert "hf_token has a space" in refusal(partial(Publishing, hf_repo_id=REPO, hf_token=token))


@pytest.mark.parametrize("name", ["dog", "a/b/c", "some one/dog", "a/.dog", "a/d--g", "a/dog.git", "a/" + "b" * 97])
def test_a_malformed_repository_is_refused_before_anything_is_trained(name: str) -> None:
    told = refusal(partial(Publishing, hf_repo_id=name, hf_token=TOKEN))
    assert told.startswith(f"hf_repo_id is {name!r}. Expected owner/name")
    assert refusal(card.check_repo_id, TOKEN) and card.check_repo_id(REPO) is None
