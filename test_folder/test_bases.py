"""Base models come whole and checked, from a hub on 127.0.0.1, by its client or by a program in pget's place."""

import hashlib
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from klora.bases.install import ensure_base
from klora.bases.pget import Pget, PgetError, find_pget
from klora.bases.table import BASES, Base
from klora.errors import BaseModelError

COMMIT, OTHER_COMMIT = "c0ffee" * 6 + "c0de", "5eed" * 10
TOKEN, MACHINES_TOKEN, SIGNATURE = "hf_givenByTheUser", "hf_thisMachinesOwn", "sIgNeDsIgNeD"
UNET, VAE, CONFIG, INDEX = "unet/weights.safetensors", "vae/weights.safetensors", "unet/config.json", "model_index.json"
FILES = {UNET: os.urandom(300_000), VAE: os.urandom(50_000), CONFIG: b'{"layers": 2}', INDEX: b'{"_class_name": "X"}'}
BASE = Base("sdxl", "owner/tiny", COMMIT, ("*.json", "*/*.json", "*/*.safetensors"), "MIT")
GATED = replace(BASE, gated=True)
FORK = get_context("fork")  # others would import all that the tests of this process have imported


class Hub:
    """A hub with the repository owner/tiny. Weights are in its large storage, at signed addresses of another origin.

    listed: sizes and hashes that it claims instead of the true ones.  broken: how many times a file's body ends early.
    lost: paths that it lists and does not have.  closed: the kind of address, "resolve" or "storage",
    that it refuses everybody.  pace: seconds between the pieces of a body.
    """

    def __init__(self) -> None:
        self.files = FILES | {"README.md": b"read me", "all_in_one.safetensors": b"not wanted"}
        self.commits = {COMMIT: COMMIT, OTHER_COMMIT: OTHER_COMMIT, "main": COMMIT}
        self.listed: dict[str, dict[str, object]] = {}
        self.broken: dict[str, int] = {}
        self.lost: set[str] = set()
        self.gated, self.closed, self.pace = False, "", 0.0
        self.asked: list[tuple[str, str, str | None]] = []  # method and address, path in the repository, Authorization
        self.lock = Lock()

    def fetched(self, *kinds: str) -> list[str]:
        """The files whose bytes were asked for, once for each time."""
        return [path for kind, path, _ in self.asked if kind in (kinds or ("GET resolve", "GET storage"))]

    def entry(self, path: str) -> dict[str, object]:
        content = self.files[path]
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
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        kind, _, rest = path.removeprefix("/").partition("/owner/tiny/" if path.startswith("/api") else "/")
        if path.startswith("/api/"):
            kind, revision, file = "api", rest.split("/")[1], ""
        elif path.startswith("/storage/"):
            kind, revision, file = "storage", COMMIT, rest
        else:
            _, _, _, _, revision, file = path.split("/", 5)
            kind = "resolve"
        with hub.lock:
            hub.asked.append((f"{self.command} {kind}", file, self.headers["Authorization"]))
        if revision not in hub.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "api":
            tree = [{"type": "directory", "path": "unet", "oid": "0" * 40}, *map(hub.entry, hub.files)]
            answer: object = tree if rest.startswith("tree/") else {"id": "owner/tiny", "sha": hub.commits[revision]}
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        if kind == "resolve" and hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if kind == hub.closed:
            return self.answer(403, {})
        if file in hub.lost:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        return self.file(kind, file)

    do_HEAD = do_GET  # noqa: N815

    def file(self, kind: str, path: str) -> None:
        content = self.server.hub.files[path]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if kind == "resolve" and path.endswith(".safetensors"):
            place = f"http://localhost:{self.server.server_port}/storage/{path}?Signature={SIGNATURE}"
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
            self.wfile.write(body[start : start + 10_000])
            self.wfile.flush()
            time.sleep(hub.pace)

    def log_message(self, *_: object) -> None:
        return


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.address = hub, f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        return  # a client that was killed


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # of processes begun here
    monkeypatch.setenv("HF_TOKEN", MACHINES_TOKEN)
    server = Server(Hub())
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server: Server) -> Hub:
    return server.hub


@pytest.fixture
def ensure(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """ensure_base of our hub's repository into tmp_path/tiny."""

    def ensure(base: Base = BASE, token: str | None = None, pget: Pget | None = None) -> Path:
        return ensure_base("tiny", base, tmp_path, token, pget, endpoint=server.address)

    return ensure


@pytest.fixture
def refusal(ensure: Callable[..., Path]) -> Callable[..., str]:
    def refusal(*given: object, **named: object) -> str:
        with pytest.raises(BaseModelError) as error:
            ensure(*given, **named)
        assert not [secret for secret in (TOKEN, MACHINES_TOKEN, SIGNATURE) if secret in str(error.value)]
        return str(error.value)

    return refusal


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an installed base by path, without the notes of those that fetched it."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in paths.items() if name.parts[0] != ".cache"}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".incomplete", ".pid", ".new"))]


# A program in pget's place. How it behaves is in a file beside it, for its environment has to be empty.

PGET = """#!{python} -I
import argparse, json, os, pathlib, subprocess, sys, time, urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("-f", "--force", action="store_true")
parser.add_argument("-c", "--concurrency", type=int)
parser.add_argument("-m", "--chunk-size")
parser.add_argument("--pid-file", default="/run/pget.pid")
parser.add_argument("url")
parser.add_argument("dest", type=pathlib.Path)
given = parser.parse_args()
here = pathlib.Path(__file__).parent
how = (here / "how").read_text()
pathlib.Path(given.pid_file).write_text(str(os.getpid()))
pids = [os.getpid()]
if how == "hang":
    pids.append(subprocess.Popen(["sleep", "60"]).pid)
with (here / "runs").open("a") as runs:
    runs.write(json.dumps(dict(argv=sys.argv, environ=dict(os.environ), pids=pids)) + "\\n")
if given.dest.exists() and not given.force:
    sys.exit("destination exists")
body = urllib.request.urlopen(given.url).read()
if how == "nothing":
    sys.exit(0)
if how == "wrong":
    body = body[:-1] + bytes([body[-1] ^ 1])
if how in ("partial", "hang"):
    body = body[: len(body) // 2]
given.dest.write_bytes(body)
if how == "hang":
    time.sleep(60)
os.remove(given.pid_file)
sys.exit(how == "partial")
"""


class FakePget:
    """The program and what it was run with."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = folder / "pget"
        self.path.write_text(PGET.replace("{python}", sys.executable))
        self.path.chmod(0o755)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.behave("well")

    def behave(self, how: str) -> None:
        (self.path.parent / "how").write_text(how)

    def runs(self) -> list[dict[str, list[str]]]:
        runs = self.path.parent / "runs"
        return [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakePget:
    return FakePget(tmp_path_factory.mktemp("bin") / "bin")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def soon(true: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true())


# The table.


def test_the_table_pins_a_commit_of_every_base_that_has_to_be_accepted_or_is_fetched_by_name() -> None:
    pinned = {name for name, base in BASES.items() if len(base.revision) == 40}
    assert {"sdxl", "flux-dev", "flux-schnell", "safety-checker"} <= pinned
    assert {name for name, base in BASES.items() if base.gated} == {"flux-dev"}


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("sdxl", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"),
        ("flux-dev", "transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "flux1-dev.safetensors"),
        ("flux-dev", "tokenizer_2/spiece.model", "ae.safetensors"),
        ("segmenter", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_base_wants_the_files_that_are_loaded_and_no_others(name: str, wanted: str, unwanted: str) -> None:
    assert (BASES[name].wants(wanted), BASES[name].wants(unwanted)) == (True, False)


# By the hub's client.


def test_the_wanted_files_come_as_the_hub_has_them(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    assert ensure() == tmp_path / "tiny"
    assert contents(tmp_path / "tiny") == FILES
    assert sorted(hub.fetched()) == sorted(FILES)
    assert {token for *_, token in hub.asked} == {None}


def test_a_second_time_only_the_list_is_asked_for(hub: Hub, ensure: Callable[..., Path]) -> None:
    ensure()
    hub.asked.clear()
    ensure()
    assert hub.asked == [("GET api", "", None)]


def test_each_file_has_one_line_in_the_log_and_no_line_has_a_signed_address(
    ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ensure()
    lines = [record.getMessage() for record in caplog.records if record.name == "klora.bases.install"]
    assert lines[0] == f"tiny: 4 of 4 files to fetch (0.000 GB) from owner/tiny at {COMMIT}."
    words = [line.split(" in ")[0] for line in lines[1:]]
    assert sorted(words) == sorted(f"tiny: {path}, {len(content)} bytes" for path, content in FILES.items())
    assert all(line.endswith(" s by huggingface_hub.") for line in lines[1:])
    assert any(record.name == "httpx2" and "/storage/" in record.getMessage() for record in caplog.records)
    assert SIGNATURE not in caplog.text


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    hub.broken = {UNET: 1}
    ensure()
    assert (contents(tmp_path / "tiny"), hub.fetched().count(UNET)) == (FILES, 2)
    assert "Trying to resume download" in caplog.text
    assert SIGNATURE not in caplog.text


def test_half_a_base_is_not_installed_and_its_other_half_is_fetched(
    hub: Hub, ensure: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path
) -> None:
    hub.lost = {UNET}
    message = refusal()
    assert message.startswith("tiny cannot be fetched from owner/tiny: ")
    assert message.endswith("What has come stays; the next attempt fetches the rest.")
    assert not (tmp_path / "tiny" / INDEX).exists()
    hub.lost, hub.asked = set(), []
    there = contents(tmp_path / "tiny")
    ensure()
    assert set(hub.fetched()) == set(FILES) - set(there)
    assert contents(tmp_path / "tiny") == FILES


def test_the_index_comes_last(hub: Hub, ensure: Callable[..., Path]) -> None:
    ensure()
    assert hub.fetched()[-1] == INDEX


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_complete_base_is_checked_by_sizes(
    hub: Hub, ensure: Callable[..., Path], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    ensure()
    (tmp_path / "tiny" / VAE).write_bytes(change(FILES[VAE]))
    hub.asked.clear()
    ensure()
    assert (hub.fetched(), contents(tmp_path / "tiny")) == ([VAE], FILES)


def test_without_its_mark_a_base_is_checked_by_sha256(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    """P4: what is there without a mark of success may be anything."""
    ensure()
    (tmp_path / "tiny" / ".cache" / "klora" / "state").unlink()
    (tmp_path / "tiny" / VAE).write_bytes(FILES[VAE][::-1])
    (tmp_path / "tiny" / CONFIG).write_bytes(FILES[CONFIG][::-1])
    hub.asked.clear()
    ensure()
    assert contents(tmp_path / "tiny") == FILES
    assert set(hub.fetched()) == {VAE, CONFIG, INDEX}  # of the small files nothing says of which commit they are


def test_another_commit_replaces_what_has_changed(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    ensure()
    hub.files = hub.files | {VAE: FILES[VAE][::-1], CONFIG: FILES[CONFIG][::-1]}
    hub.asked.clear()
    ensure(replace(BASE, revision=OTHER_COMMIT))
    assert contents(tmp_path / "tiny") == {path: hub.files[path] for path in FILES}
    assert UNET not in hub.fetched()


def test_a_branch_is_the_commit_that_it_points_to(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    ensure(replace(BASE, revision="main"))
    hub.asked.clear()
    ensure()
    assert (hub.fetched(), contents(tmp_path / "tiny")) == ([], FILES)


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_token_goes_to_the_hub_and_never_to_its_storage(
    hub: Hub, ensure: Callable[..., Path], token: str | None
) -> None:
    ensure(BASE, token)
    sent = {
        kind: {seen for k, _, seen in hub.asked if k == kind} for kind in ("GET api", "HEAD resolve", "GET storage")
    }
    given = {token and f"Bearer {token}"}
    assert sent == {"GET api": given, "HEAD resolve": given, "GET storage": {None}}


# What goes wrong.


def test_a_size_that_is_not_the_listed_one_is_refused(hub: Hub, refusal: Callable[..., str], tmp_path: Path) -> None:
    hub.listed = {VAE: {"size": len(FILES[VAE]) + 1}}
    assert refusal().startswith(f"{VAE} of tiny came from owner/tiny as {len(FILES[VAE])} bytes with ")
    assert not (tmp_path / "tiny" / VAE).exists()


def test_a_sha256_that_is_not_the_listed_one_is_refused(hub: Hub, refusal: Callable[..., str], tmp_path: Path) -> None:
    hub.listed = {VAE: {"oid": "ab" * 32}}
    seen, size = hashlib.sha256(FILES[VAE]).hexdigest(), len(FILES[VAE])
    assert refusal() == (
        f"{VAE} of tiny came from owner/tiny as {size} bytes with the SHA-256 {seen}. "
        f"Expected {size} bytes with the SHA-256 {'ab' * 32}."
    )
    assert not {VAE, INDEX} & set(contents(tmp_path / "tiny"))


@pytest.mark.parametrize("base", [BASE, GATED])
def test_a_gated_base_without_a_token_says_what_to_do(hub: Hub, refusal: Callable[..., str], base: Base) -> None:
    hub.gated = True
    assert refusal(base) == "tiny is gated: accept the licence at huggingface.co/owner/tiny and give a token."


def test_a_hub_out_of_reach_is_a_sentence(server: Server, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as error:
        ensure_base("tiny", replace(BASE, revision="main"), tmp_path, endpoint="http://127.0.0.1:9")
    assert str(error.value) == (
        "tiny cannot be fetched from owner/tiny: [Errno 111] Connection refused. "
        "What has come stays; the next attempt fetches the rest."
    )


@pytest.mark.parametrize("kind", ["resolve", "storage"])
def test_a_refusal_is_told_with_its_address_but_without_the_signature(
    hub: Hub, refusal: Callable[..., str], kind: str
) -> None:
    hub.closed = kind
    message = refusal()
    assert message.startswith("tiny cannot be fetched from owner/tiny: ")
    assert "403 Forbidden" in message and f"/{kind}/" in message


def test_a_commit_that_is_gone_is_a_sentence(refusal: Callable[..., str]) -> None:
    message = refusal(replace(BASE, revision="ab" * 20))
    assert message.startswith("tiny cannot be fetched from owner/tiny: 404 Client Error.")
    assert "\n" not in message


def test_a_repository_with_nothing_of_the_base_is_refused(hub: Hub, refusal: Callable[..., str]) -> None:
    hub.files = {"README.md": b"moved"}
    assert refusal() == f"owner/tiny at {COMMIT} holds nothing of tiny. Expected a diffusers folder."
    assert hub.fetched() == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    hub: Hub, refusal: Callable[..., str], tmp_path: Path
) -> None:
    hub.listed = {VAE: {"size": 10**18}}
    message = refusal()
    assert message.startswith(f"tiny needs 1000000000.0 GB more in {tmp_path / 'tiny'}, where ")
    assert message.endswith(" GB are free. Expected a disk with room for its files.")
    assert hub.fetched() == []


def ensure_with_small_files(limit: int, folder: Path, endpoint: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ensure_base("tiny", BASE, folder, endpoint=endpoint)


def test_a_disk_that_takes_no_more_is_a_sentence(server: Server, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=FORK) as pool, pytest.raises(BaseModelError) as error:
        pool.submit(ensure_with_small_files, 100_000, tmp_path, server.address).result()
    assert str(error.value) == (
        f"tiny cannot be written into {tmp_path / 'tiny'}: File too large. Expected a disk with room for its files."
    )
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(BaseModelError, match=r"^tiny cannot be written into .*/tiny: Not a directory\. Expected"):
        ensure_base("tiny", BASE, tmp_path / "models", endpoint=server.address)


# Several processes, and processes that end.


def test_two_at_once_fetch_each_file_once(server: Server, tmp_path: Path) -> None:
    """P5: the set-up of two containers that share a folder."""
    server.hub.pace = 0.02
    with ProcessPoolExecutor(2, mp_context=FORK) as pool:
        waiting = [pool.submit(ensure_base, "tiny", BASE, tmp_path, endpoint=server.address) for _ in range(2)]
        assert [done.result() for done in waiting] == [tmp_path / "tiny"] * 2
    assert server.hub.fetched().count(UNET) == server.hub.fetched().count(INDEX) == 1
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


def test_who_has_waited_for_another_has_nothing_to_do(
    server: Server, ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    server.hub.pace = 0.01
    caplog.set_level(logging.INFO, "klora.bases")
    with ThreadPoolExecutor(3) as pool:
        assert len({done.result() for done in [pool.submit(ensure) for _ in range(3)]}) == 1
    assert sum("files to fetch" in line for line in caplog.messages) == 1


def begun(folder: Path, server: Server, pget: Pget | None = None) -> BaseProcess:
    """ensure_base in a process of its own."""
    process = FORK.Process(
        target=ensure_base, args=("tiny", BASE, folder, None, pget), kwargs={"endpoint": server.address}
    )
    process.start()
    return process


def test_a_process_killed_half_way_leaves_what_the_next_one_goes_on_from(
    server: Server, ensure: Callable[..., Path], tmp_path: Path
) -> None:
    server.hub.pace = 0.1
    process = begun(tmp_path, server)
    assert soon(lambda: (tmp_path / "tiny" / VAE).exists() and leftovers(tmp_path))
    process.kill()
    process.join()
    assert not (tmp_path / "tiny" / INDEX).exists()
    server.hub.pace, server.hub.asked = 0, []
    ensure()
    assert set(server.hub.fetched()) == {UNET, INDEX}
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


@pytest.mark.parametrize("by", ["huggingface_hub", "pget"])
def test_an_interruption_ends_what_is_under_way(
    server: Server, fake: FakePget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # our files are small
    pget = Pget(fake.path) if by == "pget" else None
    server.hub.pace = 0.0 if pget else 2.0  # a minute for the largest file
    fake.behave("hang")
    process = begun(tmp_path, server, pget)
    assert soon(lambda: len(fake.runs()) == 2 if pget else UNET in server.hub.fetched())
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1
    assert soon(lambda: not any(is_running(pid) for run in fake.runs() for pid in run["pids"]), 2)
    assert leftovers(tmp_path) == []
    assert not pget or not {UNET, VAE} & set(server.hub.fetched("HEAD resolve"))  # the client does not begin anew


# By pget.


def test_pget_fetches_the_large_files_and_the_client_the_small_ones(
    hub: Hub, ensure: Callable[..., Path], fake: FakePget, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "klora.bases")
    ensure(pget=Pget(fake.path))
    assert contents(tmp_path / "tiny") == FILES
    by = {line.split()[1].rstrip(","): line.split()[-1] for line in caplog.messages if " bytes in " in line}
    assert by == {UNET: "pget.", VAE: "pget.", CONFIG: "huggingface_hub.", INDEX: "huggingface_hub."}
    assert sorted(hub.fetched("GET storage")) == sorted([UNET, VAE])
    assert leftovers(tmp_path) == []


def test_pget_is_given_a_fresh_path_a_lock_of_its_own_and_no_environment(
    ensure: Callable[..., Path], fake: FakePget, server: Server, tmp_path: Path
) -> None:
    ensure(pget=Pget(fake.path))
    runs = fake.runs()
    assert sorted(run["argv"][-2] for run in runs) == sorted(
        f"{server.address}/owner/tiny/resolve/{COMMIT}/{path}" for path in (UNET, VAE)
    )
    paths = {word for run in runs for word in run["argv"] if word.startswith(str(tmp_path))}
    assert len(paths) == 4  # a file and a lock each
    assert all(Path(path).parent == tmp_path / "tiny" / ".cache" / "klora" for path in paths)
    assert all(not {"HF_TOKEN", "PATH", "HOME"} & run["environ"].keys() for run in runs)


@pytest.mark.parametrize(("base", "token"), [(BASE, TOKEN), (GATED, TOKEN)])
def test_pget_never_runs_with_a_token_about(
    hub: Hub, ensure: Callable[..., Path], fake: FakePget, base: Base, token: str, tmp_path: Path
) -> None:
    hub.gated = base.gated
    ensure(base, token, Pget(fake.path))
    assert (fake.runs(), contents(tmp_path / "tiny")) == ([], FILES)


def test_pget_never_runs_for_a_gated_base(hub: Hub, refusal: Callable[..., str], fake: FakePget) -> None:
    hub.gated = True
    assert refusal(GATED, None, Pget(fake.path)).startswith("tiny is gated: ")
    assert fake.runs() == []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("wrong", "as 50000 bytes with the SHA-256 "),
        ("partial", "it ended with status 1"),
        ("nothing", "as 0 bytes. Expected 50000 bytes with the SHA-256 "),
    ],
)
def test_what_pget_fails_the_client_fetches(
    ensure: Callable[..., Path], fake: FakePget, caplog: pytest.LogCaptureFixture, tmp_path: Path, how: str, said: str
) -> None:
    """P4, too: of a part that pget leaves nothing is used."""
    fake.behave(how)
    ensure(pget=Pget(fake.path))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    failed = next(line for line in warnings if f"not fetched {VAE}" in line)
    assert failed.startswith(f"tiny: pget has not fetched {VAE}, huggingface_hub will: ")
    assert said in failed
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


def test_a_pget_that_hangs_is_killed_with_its_whole_group(
    ensure: Callable[..., Path], fake: FakePget, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """P3"""
    fake.behave("hang")
    began = time.monotonic()
    ensure(pget=Pget(fake.path, patience=2))
    assert time.monotonic() - began < 30  # pget would take 60
    pids = [pid for run in fake.runs() for pid in run["pids"]]
    assert pids
    assert soon(lambda: not any(map(is_running, pids)), 2)
    assert "huggingface_hub will: it took more than 2 s" in caplog.text
    assert (contents(tmp_path / "tiny"), leftovers(tmp_path)) == (FILES, [])


def test_a_pget_that_cannot_be_run_is_no_obstacle(ensure: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "pget").write_text("")
    ensure(pget=Pget(tmp_path / "pget"))
    assert contents(tmp_path / "tiny") == FILES


def test_a_large_file_takes_its_time(fake: FakePget, tmp_path: Path, server: Server) -> None:
    """The patience is beside the time for the size: 2.5 s for 12.5 MB."""
    fake.behave("hang")
    began = time.monotonic()
    with pytest.raises(PgetError, match=r"^it took more than 3 s$"):
        Pget(fake.path, patience=0.01).fetch(f"{server.address}/storage/{VAE}", tmp_path / "part", 12_500_000)
    assert 2.4 < time.monotonic() - began < 30


# Which pget.


def test_without_pget_there_is_none_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """P1"""
    caplog.set_level(logging.INFO)
    assert find_pget("ab" * 32, str(tmp_path / "pget")) is None
    assert caplog.messages == ["pget is not installed: huggingface_hub fetches the base models."]


def test_a_pget_of_the_pinned_bytes_is_found_on_the_path(fake: FakePget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"/nowhere:{fake.path.parent}")
    assert find_pget(fake.sha256.upper() + "\n") == Pget(fake.path)


def test_a_pget_of_other_bytes_is_refused(fake: FakePget) -> None:
    """P2"""
    with fake.path.open("a") as program:
        program.write("# changed\n")
    seen = hashlib.sha256(fake.path.read_bytes()).hexdigest()
    with pytest.raises(BaseModelError) as error:
        find_pget(fake.sha256, str(fake.path))
    assert str(error.value) == (
        f"{fake.path} has the SHA-256 {seen}. Expected {fake.sha256}, to which KLORA_PGET_SHA256 is set."
    )
    assert fake.runs() == []


@pytest.mark.parametrize("sha256", [None, ""])
def test_a_pget_that_nobody_has_pinned_is_not_used_and_the_log_says_so(
    fake: FakePget, caplog: pytest.LogCaptureFixture, sha256: str | None
) -> None:
    caplog.set_level(logging.INFO)
    assert find_pget(sha256, str(fake.path)) is None
    assert caplog.messages == [
        f"{fake.path} is not used, for nothing says which SHA-256 it must have: set KLORA_PGET_SHA256."
    ]
