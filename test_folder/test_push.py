"""The upload of a training, to a hub on 127.0.0.1."""

import base64
import json
import logging
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from klora.errors import RequestError
from klora.training import hub as uploads
from klora.training.hub import check_repo_id, push
from klora.training.publishing import Publishing

TOKEN, MACHINES_TOKEN, REPO = "hf_givenByTheUser", "hf_thisMachinesOwn", "someone/a-dog"
PAGE = f"https://huggingface.co/{REPO}"  # what the library turns into an address of the endpoint
REGULAR = {"uploadMode": "regular", "shouldIgnore": False}
STEPS = [("repos/create", status) for status in (401, 403, 413)] + [("commit/main", s) for s in (401, 403, 404, 409)]


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
    monkeypatch.setattr(uploads, "HfApi", partial(huggingface_hub.HfApi, endpoint=hub.url))
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
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n\n# A dog\n")
    return tmp_path


def refusal(call: Callable[..., object], *given: object) -> str:
    with pytest.raises(RequestError) as error:
        call(*given)
    assert "hf_given" not in (logged := "".join(traceback.format_exception(error.value))) and "hf_this" not in logged
    return re.fullmatch("hf_repo_id is .* Expected .*", str(error.value)).group()


@pytest.mark.parametrize("refusals", [{}, {"repos/create": 409}], ids=["new", "there"])
def test_all_but_the_resume_state_arrives_byte_for_byte(hub: Hub, folder: Path, refusals: dict[str, int]) -> None:
    hub.refusals = refusals
    assert push(folder, REPO, TOKEN) == f"{hub.url}/{REPO}"
    files = [line["value"] for line in hub.asked["commit/main"][1][1:]]  # behind the message
    wanted = {name: (folder / name).read_bytes() for name in ("README.md", "lora.safetensors", "samples/1.png")}
    assert {file["path"]: base64.b64decode(file["content"]) for file in files} == wanted
    assert {token for token, _ in hub.asked.values()} == {f"Bearer {TOKEN}"}
    assert hub.addresses == {hub.server_address}


@pytest.mark.parametrize(("given", "made"), [((), "private"), ((True,), "private"), ((False,), "public")])
def test_the_repository_is_private_unless_asked_otherwise(hub: Hub, folder: Path, given: Any, made: str) -> None:
    push(folder, REPO, TOKEN, *given)
    (body,) = hub.asked["repos/create"][1]
    assert (f"{body['organization']}/{body['name']}", body["visibility"]) == (REPO, made)


def test_what_is_published_is_as_private_as_was_asked_and_shows_no_token(hub: Hub, folder: Path) -> None:
    publishing = Publishing(hf_repo_id=REPO, hf_token=TOKEN, hf_private=False)
    publishing.push(folder)
    assert hub.asked["repos/create"][1][0]["visibility"] == "public" and TOKEN not in repr(publishing)


def test_a_public_repository_that_is_there_gets_nothing_that_was_meant_to_be_private(hub: Hub, folder: Path) -> None:
    hub.private, hub.refusals = False, {"repos/create": 409}
    assert refusal(push, folder, REPO, TOKEN) == (
        f"hf_repo_id is '{REPO}', which is public, and hf_private is true. "
        "Expected a private repository, or hf_private=false."
    )
    assert hub.asked.keys() == {"repos/create", f"models/{REPO}"}
    assert push(folder, REPO, TOKEN, False) == f"{hub.url}/{REPO}"


@pytest.mark.parametrize(("step", "status"), STEPS)
def test_a_refusal_is_told_without_the_token(hub: Hub, folder: Path, step: str, status: int) -> None:
    hub.refusals = {step: status, f"models/{REPO}": status}
    assert f"hf_repo_id is '{REPO}', but the hub refused it ({status}). " in refusal(push, folder, REPO, TOKEN)


@pytest.mark.parametrize("step", [None, "commit/main"])
def test_the_hubs_libraries_log_no_address_for_a_signed_one_is_a_key(
    hub: Hub, folder: Path, step: str | None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    hub.refusals = {step: 500, f"models/{REPO}": 500} if step else {}
    with suppress(RequestError):
        push(folder, REPO, TOKEN)
    assert caplog.messages == [] and "127.0.0.1" not in capfd.readouterr().err
    logging.getLogger("huggingface_hub").warning("heard again")
    assert caplog.messages == ["heard again"]


def test_a_hub_out_of_reach_is_told_without_the_token(hub: Hub, folder: Path) -> None:
    hub.shutdown()
    hub.server_close()
    assert "the upload broke off (ConnectError)" in refusal(push, folder, REPO, TOKEN)


@pytest.mark.parametrize("token", [" ", f"{TOKEN}\n", f"{TOKEN} {TOKEN}", f"{TOKEN}é"])
def test_a_token_that_no_header_can_carry_is_refused_before_anything_is_trained(token: str) -> None:
    assert "hf_token has a space" in refusal(partial(Publishing, hf_repo_id=REPO, hf_token=token))


@pytest.mark.parametrize("name", ["dog", "a/b/c", "some one/dog", "a/.dog", "a/d--g", "a/dog.git", "a/" + "b" * 97])
def test_a_malformed_repository_is_refused_before_anything_is_trained(name: str) -> None:
    told = refusal(partial(Publishing, hf_repo_id=name, hf_token=TOKEN))
    assert told.startswith(f"hf_repo_id is {name!r}. Expected owner/name")
    assert refusal(check_repo_id, TOKEN) and check_repo_id(REPO) is None
