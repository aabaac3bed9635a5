"""A Hugging Face hub on 127.0.0.1 as klora.bases needs it: it breaks off, dawdles and lies when it is told to."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import starmap
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from klora.bases.table import Base

COMMIT, OTHER_COMMIT = "c0ffee" * 6 + "c0de", "5eed" * 10
TOKEN, MACHINES_TOKEN, SIGNATURE = "hf_givenByTheUser", "hf_thisMachinesOwn", "sIgNeDsIgNeD"
UNET, VAE, CONFIG, INDEX = "unet/weights.safetensors", "vae/weights.safetensors", "unet/config.json", "model_index.json"
FILES = {UNET: os.urandom(300_000), VAE: os.urandom(50_000), CONFIG: b'{"layers": 2}', INDEX: b'{"_class_name": "X"}'}
REPOSITORY = "owner/tiny"
BASE = Base("sdxl", REPOSITORY, COMMIT, ("*.json", "*/*.json", "*/*.safetensors"), "MIT")
GATED = replace(BASE, gated=True)


class Hub:
    """A hub whose repositories all hold the same, at all commits, but for those that others and only speak of. Weights
    are in its storage, at signed addresses of another origin.

    others: the files of a repository.  only: the one commit that a repository has.  tokens: any other is refused
    everywhere.  gated: repositories that only a token opens.  listed: sizes and hashes that it claims instead of the
    true ones.  broken: how many times a file's body ends early.  lost: paths that it lists and does not have.  closed:
    the kind of address, "resolve" or "storage", that it refuses everybody.  pace: seconds between the pieces of a body.
    """

    def __init__(self) -> None:
        self.files = FILES | {"README.md": b"read me", "all_in_one.safetensors": b"not wanted"}
        self.others: dict[str, dict[str, bytes]] = {}
        self.only: dict[str, str] = {}
        self.repositories, self.gated, self.tokens = {REPOSITORY}, set[str](), {TOKEN}
        self.commits = {COMMIT, OTHER_COMMIT}
        self.listed: dict[str, dict[str, object]] = {}
        self.broken: dict[str, int] = {}
        self.lost: set[str] = set()
        self.held: set[str] = set()
        self.closed, self.pace = "", 0.0
        self.asked: list[tuple[str, str, str | None]] = []  # method and address, path in the repository, Authorization
        self.lock = Lock()

    def publish(self, *bases: Base) -> None:
        """Have these repositories, too."""
        self.repositories |= {base.repository for base in bases}
        self.gated |= {base.repository for base in bases if base.gated}
        self.commits |= {base.revision for base in bases}

    def fetched(self, *kinds: str) -> list[str]:
        """The files whose bytes were asked for, once for each time."""
        return [path for kind, path, _ in self.asked if kind in (kinds or ("GET resolve", "GET storage"))]

    def files_of(self, repository: str) -> dict[str, bytes]:
        return self.others.get(repository, self.files)

    def entry(self, path: str, content: bytes) -> dict[str, object]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(".safetensors"):
            claimed = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)} | self.listed.get(path, {})
            entry |= {"lfs": claimed | {"pointerSize": 134}, "size": claimed["size"]}
        return entry


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        hub, token = self.server.hub, self.headers["Authorization"]
        kind, repository, revision, file = located(unquote(urlsplit(self.path).path))
        with hub.lock:
            hub.asked.append((f"{self.command} {kind}", file, token))
        if token not in (None, *(f"Bearer {known}" for known in hub.tokens)):
            return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if kind != "storage" and repository not in hub.repositories:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in hub.commits or (kind != "storage" and revision != hub.only.get(repository, revision)):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            tree = [
                {"type": "directory", "path": "unet", "oid": "0" * 40},
                *starmap(hub.entry, hub.files_of(repository).items()),
            ]
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        if kind == "resolve" and repository in hub.gated and token is None:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if kind == hub.closed:
            return self.answer(403, {})
        if file in hub.lost:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        return self.file(kind, repository, file, revision)

    do_HEAD = do_GET  # noqa: N815

    def file(self, kind: str, repository: str, path: str, commit: str) -> None:
        content = self.server.hub.files_of(repository)[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if kind == "resolve" and path.endswith(".safetensors"):
            place = f"http://localhost:{self.server.server_port}/storage/{repository}/{path}?Signature={SIGNATURE}"
            linked = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            return self.answer(302, headers | linked | {"Location": place})
        if begin := self.headers["Range"]:
            start = int(begin.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, headers, content[start:], path)
        return self.answer(200, headers, content, path)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"", path: str = "") -> None:
        hub = self.server.hub
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.broken.get(path, 0):
            hub.broken[path] -= 1
            body, self.close_connection = body[: len(body) // 2], True
        for start in range(0, len(body), 10_000):
            while start * 2 >= len(body) and path in hub.held:
                time.sleep(0.01)
            self.wfile.write(body[start : start + 10_000])
            self.wfile.flush()
            time.sleep(hub.pace)

    def log_message(self, *_: object) -> None:
        return


def located(path: str) -> tuple[str, str, str, str]:
    """(kind, repository, revision, file) of an address."""
    first, *rest = path.strip("/").split("/")
    if first == "storage":
        return first, "/".join(rest[:2]), COMMIT, "/".join(rest[2:])
    if first == "api":
        return rest[3], "/".join(rest[1:3]), rest[4], ""
    return rest[1], f"{first}/{rest[0]}", rest[2], "/".join(rest[3:])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.address = hub, f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        return  # a client that was killed


@contextmanager
def serving() -> Iterator[Server]:
    """A hub, and that this process and those that it begins may ask it, on a machine that has a login of its own."""
    server = Server(Hub())
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_TOKEN", MACHINES_TOKEN)
        yield server
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an installed base by path, without the notes of those that fetched it."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in paths.items() if name.parts[0] != ".cache"}


def leftovers(folder: Path) -> list[Path]:
    """What a fetch that ended in order takes away."""
    return [path for path in folder.rglob("*") if path.name.endswith((".incomplete", ".pid", ".new"))]
