"""download_base against a hub on 127.0.0.1: what is asked for, with which token, and that what comes down loads."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import weights
from klora.errors import BaseModelError
from klora.models import load_model
from test_folder import tiny

CPU = torch.device("cpu")
MACHINES_TOKEN = "hf_thisMachinesOwn"
USERS_TOKEN = "hf_givenByTheUser"
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"

Download = Callable[..., Path]


class Hub:
    """A Hugging Face hub with one repository a base; says who asked for what.

    files: what it serves, by path.  gated: which of "api" and "resolve" it refuses.  asked: (method, kind, revision,
    path, Authorization) of every request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.forget()

    def forget(self) -> None:
        """Serve every file to anyone, and forget who asked."""
        self.gated: tuple[str, ...] = ()
        self.asked: list[tuple[str, str, str, str, str | None]] = []

    def fetched(self) -> set[str]:
        """The files whose contents were asked for and sent."""
        return {path for method, kind, _, path, _ in self.asked if (method, kind) == ("GET", "resolve")}

    def answer(self, method: str, address: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        kind, revision, path = self._parsed(unquote(urlsplit(address).path))
        self.asked.append((method, kind, revision, path, token))
        if kind == "nothing":
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if kind in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if kind == "api":
            return 200, {"Content-Type": "application/json"}, json.dumps([*map(self._entry, self.files)]).encode()
        content = self.files[path]
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": revision}, content

    def _parsed(self, path: str) -> tuple[str, str, str]:
        for base in (weights.BASES["sdxl"], weights.BASES["flux-dev"]):
            listing, contents = f"/api/models/{base.repository}/tree/", f"/{base.repository}/resolve/"
            if path == listing + base.revision:
                return "api", base.revision, ""
            if path.startswith(contents + base.revision):
                return "resolve", base.revision, path.removeprefix(f"{contents}{base.revision}/")
        return "nothing", "", path

    def _entry(self, path: str) -> dict[str, str | int]:
        content = self.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """SDXL as its authors publish it: both precisions, other frameworks, single files. The fp32 files are of seed 1."""
    folder = tmp_path_factory.mktemp("repository")
    half = StableDiffusionXLPipeline.from_pretrained(tiny.build_sdxl(folder / "full"), dtype=torch.float16)
    half.save_pretrained(folder / "published", variant="fp16")
    shutil.copytree(tiny.build_sdxl(folder / "other", seed=1), folder / "published", dirs_exist_ok=True)
    files = {
        str(path.relative_to(folder / "published")): path.read_bytes()
        for path in sorted((folder / "published").rglob("*"))
        if path.is_file()
    }
    extras = ("README.md", "sd_xl_base_1.0.safetensors", "text_encoder/model.onnx", "unet/flax_model.msgpack")
    return files | dict.fromkeys((*extras, "text_encoder/pytorch_model.bin", "pipeline.png"), b"not asked for")


@pytest.fixture(scope="module")
def wanted(repository: dict[str, bytes]) -> set[str]:
    """What download_base has to fetch of that repository."""
    plain = {path for path in repository if path.endswith(".safetensors") and ".fp16." not in path}
    return {path for path in repository if repository[path] != b"not asked for"} - plain


@pytest.fixture(scope="module")
def served(repository: dict[str, bytes]) -> Iterator[tuple[Hub, str]]:
    """The hub and its address."""
    hub = Hub(repository)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path, self.headers["Authorization"])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def worker(served: tuple[Hub, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Download]:
    """weights.download_base in a process whose hub is ours: huggingface_hub reads its environment at import."""
    environment = {
        "HF_ENDPOINT": served[1],
        "HF_TOKEN": MACHINES_TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield lambda *given: pool.submit(weights.download_base, *given).result()


@pytest.fixture
def hub(served: tuple[Hub, str]) -> Hub:
    served[0].forget()
    return served[0]


@pytest.fixture(scope="module")
def downloaded(worker: Download, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came down, once for the tests that only look at it."""
    return worker("sdxl", tmp_path_factory.mktemp("models"), None)


def published(folder: Path) -> set[str]:
    """The files below folder, without the hub client's own notes."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in paths if path.parts[0] != ".cache"}


def refusal(download: Download, *given: object) -> str:
    with pytest.raises(BaseModelError) as error:
        download(*given)
    return str(error.value)


def test_only_the_wanted_files_are_fetched(hub: Hub, worker: Download, wanted: set[str], tmp_path: Path) -> None:
    assert worker("sdxl", tmp_path, None) == tmp_path / "sdxl"
    assert published(tmp_path / "sdxl") == hub.fetched() == wanted


def test_what_is_fetched_is_what_the_hub_has(downloaded: Path, repository: dict[str, bytes], wanted: set[str]) -> None:
    assert {path: (downloaded / path).read_bytes() for path in wanted} == {path: repository[path] for path in wanted}


def test_every_request_names_the_pinned_revision(hub: Hub, worker: Download, tmp_path: Path) -> None:
    worker("sdxl", tmp_path, None)
    assert {revision for _, _, revision, _, _ in hub.asked} == {weights.BASES["sdxl"].revision}


def test_every_request_carries_the_token_that_was_given(hub: Hub, worker: Download, tmp_path: Path) -> None:
    worker("sdxl", tmp_path, USERS_TOKEN)
    assert {token for *_, token in hub.asked} == {f"Bearer {USERS_TOKEN}"}


@pytest.mark.parametrize("kind", ["api", "resolve"])
def test_a_gated_base_says_what_to_do_and_keeps_the_token_to_itself(
    hub: Hub, worker: Download, tmp_path: Path, kind: str
) -> None:
    hub.gated = (kind,)
    message = refusal(worker, "flux-dev", tmp_path, USERS_TOKEN)
    assert message == (
        "flux-dev is gated: accept the licence at huggingface.co/black-forest-labs/FLUX.1-dev and set HF_TOKEN to a "
        "token of the account that has."
    )


def test_a_repository_that_is_gone_is_named(hub: Hub, worker: Download, tmp_path: Path) -> None:
    message = refusal(worker, "flux-schnell", tmp_path, USERS_TOKEN)
    assert message.startswith("flux-schnell cannot be fetched from black-forest-labs/FLUX.1-schnell: 404 Client Error.")
    assert USERS_TOKEN not in message


def test_a_refusal_is_an_error_though_the_folder_has_begun(hub: Hub, worker: Download, tmp_path: Path) -> None:
    (tmp_path / "flux-dev").mkdir()
    (tmp_path / "flux-dev" / "model_index.json").write_text("{}")
    hub.gated = ("api",)
    assert refusal(worker, "flux-dev", tmp_path, USERS_TOKEN).startswith("flux-dev is gated: ")


def test_a_base_that_the_table_does_not_have_is_refused(hub: Hub, worker: Download, tmp_path: Path) -> None:
    assert refusal(worker, "sd-1.5", tmp_path, None) == (
        "There is no base model 'sd-1.5'. Expected one of sdxl, illustrious-xl, flux-dev, flux-schnell, "
        "captioner, segmenter, safety-checker."
    )
    assert hub.asked == []


def test_what_was_fetched_loads_as_the_half_precision_variant(downloaded: Path) -> None:
    stored = load_file(downloaded / UNET)
    loaded = load_model("sdxl", downloaded, CPU, torch.float32).denoiser.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


def test_half_precision_is_chosen_where_both_are_there(downloaded: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(downloaded, tmp_path / "both"))
    half = load_file(both / UNET)
    other = {name: tensor.float() + 1 for name, tensor in half.items()}
    save_file(other, both / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    loaded = load_model("sdxl", both, CPU, torch.float32).denoiser.state_dict()
    assert all(torch.equal(loaded[name], half[name].float()) for name in half)
