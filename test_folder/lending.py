"""What tests of the cache stand on: an origin that serves files over HTTP, an authority that says what may be had."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from klora.cache import Library, Store
from klora.cache.draft import Draft
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.fetch import fetch
from klora.sources.formats import check_structure
from klora.sources.kinds import HubFile, Reference, Url
from klora.sources.network import Network

ROOMY = 1 << 30
Tokens = dict[str, str]


def safetensors(size: int, seed: int = 0) -> bytes:
    """A well-formed file of exactly so many bytes, at least 200."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [size - 200], "data_offsets": [0, size - 200]}}).encode()
    body = hashlib.sha256(str(seed).encode()).digest() * (size // 32 + 1)
    return (192).to_bytes(8, "little") + header.ljust(192) + body[: size - 200]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SIZE = 100_000
CONTENT, STYLE = safetensors(SIZE, 1), safetensors(SIZE, 2)


class Clock:
    """In the place of the module time."""

    def __init__(self, wall: Callable[[], float], running: Callable[[], float]) -> None:
        self.time, self.monotonic = wall, running


def hub(name: str) -> HubFile:
    return HubFile(f"someone/{name}")


def signed(secret: str) -> Url:
    """A link that this grants access by."""
    return Url("https://host/a.safetensors", f"https://host/a.safetensors?{secret}", secret)


class Origin:
    """Files by their path, over HTTP on loopback. served: GETs by path; pause: called in the midst of each body."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.served: Counter[str] = Counter()
        self.pause: Callable[[str], object] = lambda path: None
        origin, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    origin.served[self.path] += 1
                body = origin.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                half = len(body or b"") // 2
                try:
                    self.wfile.write((body or b"")[:half])
                    origin.pause(self.path)
                    self.wfile.write((body or b"")[half:])
                except OSError:  # whoever asked has gone
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> "Origin":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Authority:
    """What a reference comes to, and for whom. allowed: the tokens that may, None for everybody; down: out of reach."""

    origin: Origin
    downloads: dict[str, tuple[Download, ...]] = field(default_factory=dict)
    allowed: dict[str, set[str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    down: bool = False

    def has(self, reference: Reference, *files: tuple[str, bytes], commit: str = "1", **facts: object) -> None:
        """The reference comes to these (name, content); facts: of the first Download, sha256=None to say nothing."""
        found = []
        for name, body in files:
            path = f"/{sha256(f'{reference}{commit}{name}'.encode())[:8]}/{name}"
            self.origin.files[path] = body
            key, url = f"{reference}@{commit}/{name}", f"http://{self.origin.host}{path}"
            found.append(Download(key, name, url, size=len(body), sha256=sha256(body)))
        found[0] = replace(found[0], **facts)  # type: ignore[arg-type]
        self.downloads[str(reference)] = tuple(found)

    def resolve(self, reference: Reference, tokens: Tokens, deadline: Deadline) -> tuple[Download, ...]:
        deadline.left()
        name = str(reference)
        self.asked[name] += 1
        if self.down:
            raise Unreachable("The authority does not answer. Try again later.")
        if name not in self.downloads:
            raise NotFound(f"There is no {name}. Expected one that exists.")
        shown = tokens.get("hf", reference.secret if isinstance(reference, Url) else "")
        if name in self.allowed and shown not in self.allowed[name]:
            raise Denied(f"{name} wants another token. Expected one that may read it.")
        return tuple(replace(download, credential="hf" in tokens) for download in self.downloads[name])


@dataclass
class Shop:
    """A library over a store, an authority and an origin, all real."""

    root: Path
    origin: Origin
    authority: Authority
    max_bytes: int = ROOMY
    store: Store = field(init=False)
    library: Library = field(init=False)

    def __post_init__(self) -> None:
        self.reopen()

    def reopen(self) -> None:
        """As another process, or the same after a restart, sees it."""
        self.store = Store(self.root, self.max_bytes, 0)
        self.library = Library(self.store, self.authority.resolve, self.fetch, check_structure)

    def fetch(self, download: Download, draft: Draft, deadline: Deadline) -> str:
        return fetch(download, draft, Network(frozenset({self.origin.host})), deadline, 1 << 30)

    def read(self, reference: Reference, seconds: float = 20.0, **tokens: str) -> bytes:
        """The file's content, borrowed alone."""
        with self.borrowed(seconds, tokens, lora=reference) as paths:
            return paths["lora"].read_bytes()

    @contextmanager
    def borrowed(self, seconds: float, tokens: Tokens, **references: Reference) -> Iterator[dict[str, Path]]:
        with Deadline(seconds) as deadline, self.library.borrowed(references, tokens, deadline) as lent:
            yield {name: found.path for name, found in lent.items()}

    def names(self, room: str) -> list[str]:
        return sorted(path.name for path in (self.root / room).iterdir())

    def blob(self, data: bytes) -> Path:
        return self.root / "blobs" / sha256(data)

    def is_clean(self) -> bool:
        """Whether nothing is in the making or locked."""
        return not self.names("tmp") and not self.names("locks")


@contextmanager
def opened_shop(root: Path, **options: int) -> Iterator[Shop]:
    with Origin() as origin:
        yield Shop(root, origin, Authority(origin), **options)
