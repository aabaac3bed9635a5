"""Remote references through Cog's real server and the `klora` command, with authorities on loopback that lend them.

The keys T, H, C, R, D and X in the tests are those of the list of failures that a source may have.
"""

import base64
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load, save
from typer.testing import CliRunner, Result

from klora import cli
from test_folder.conformance.local import running
from test_folder.fakes import SIGNATURE, Server, Storage, tarred
from test_folder.fakes.civitai import Civitai, File
from test_folder.fakes.hub import Hub
from test_folder.fakes.replicate import Replicate
from test_folder.test_predict import QUICK, SDXL, tar_of
from test_folder.test_predict import Server as Client

ANN, MEMBER, OWNER = "hf_Canary+Ann/1=", "Canary+Member/2=", "r8_Canary+Owner/3="
TOKENS = {"hf_api_token": ANN, "civitai_api_token": MEMBER, "replicate_api_token": OWNER}
OPERATOR = "CanaryOfTheOperators"  # in the server's environment, where no request may profit from it


@dataclass
class World:
    """Every authority, and where they keep their files. hub: o/dog, o/gated and o/private; civitai: 20 and more;
    replicate: o/oil, o/private.   files: of the LoRAs, by name."""

    storage: Storage
    hub: Hub
    civitai: Civitai
    replicate: Replicate
    files: dict[str, bytes]

    @property
    def servers(self) -> tuple[Server, ...]:
        return self.storage, self.hub, self.civitai, self.replicate

    def asked(self) -> list[int]:
        """How many requests each has had."""
        return [len(server.requests) for server in self.servers]

    def environment(self, cache: Path) -> dict[str, str]:
        """What leads klora to these authorities and to no other."""
        endpoints = {"HF_ENDPOINT": self.hub, "CIVITAI_ENDPOINT": self.civitai, "REPLICATE_ENDPOINT": self.replicate}
        urls = {name: server.url for name, server in endpoints.items()}
        return urls | {"KLORA_TRUSTED_HOSTS": self.storage.host, "KLORA_CACHE": str(cache)}


@pytest.fixture(scope="module")
def world(loras: Path) -> Iterator[World]:
    files = {path.stem: path.read_bytes() for path in loras.iterdir()}
    with ExitStack() as stack:
        storage = stack.enter_context(Storage())
        hub, civitai = stack.enter_context(Hub(storage)), stack.enter_context(Civitai(storage))
        world = World(storage, hub, civitai, stack.enter_context(Replicate()), files)
        publish(world)
        yield world


def publish(world: World) -> None:
    content, style = world.files["sdxl_content"], world.files["sdxl_style"]
    world.hub.tokens_issued = {ANN}
    world.hub.publish("o/dog", {"dog.safetensors": content})
    other = save(load(content), {"bytes": "other than those of everybody's"})  # so that they are fetched
    world.hub.publish("o/gated", {"dog.safetensors": other}, readers={ANN}, gated=True)
    world.hub.publish("o/private", {"dog.safetensors": content}, readers={ANN})
    world.civitai.tokens_issued = {MEMBER}
    world.civitai.publish(1, 20, File(1, "oil.safetensors", style), baseModel="SDXL 1.0")
    world.civitai.publish(2, 21, File(2, "oil.safetensors", style), members_only=True)
    world.civitai.publish(3, 22, File(3, "oil.safetensors", style + b" "), baseModel="SD 1.5")
    world.civitai.publish(4, 23, File(4, "oil.safetensors", style), trainedWords=["zork style", "sks"])
    world.civitai.publish(5, 24, File(5, "flux.safetensors", world.files["flux_style"]), baseModel="Flux.1 D")
    world.civitai.publish(6, 25, File(6, "oil.safetensors", style), baseModel="Illustrious")
    card = {"base_model": "OnomaAIResearch/Illustrious-xl-early-release-v0"}
    world.hub.publish("o/illustrious", {"oil.safetensors": style}, card=card)
    flux = tarred({"output/flux_train_replicate/lora.safetensors": world.files["flux_content"]})
    world.replicate.weights["o/flux"] = world.storage.signed("/flux/trained_model.tar", flux)
    world.replicate.weights["o/oil"] = world.storage.signed(
        "/oil/trained_model.tar", tarred({"lora.safetensors": style})
    )
    world.replicate.weights["o/private"] = world.replicate.weights["o/oil"]
    world.replicate.readers["o/private"] = {OWNER}


@dataclass
class Service:
    """A running server. place: where its log, its cache and its temporary files are."""

    client: Client
    place: Path

    @property
    def cache(self) -> Path:
        return self.place / "cache"


@pytest.fixture(scope="module")
def service(world: World, bases: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("service")
    (place / "tmp").mkdir()
    own = {"HF_TOKEN": OPERATOR, "CIVITAI_API_TOKEN": OPERATOR, "REPLICATE_API_TOKEN": OPERATOR}
    folders = {"KLORA_MODELS": str(bases), "KLORA_LORA_ROOT": str(loras), "TMPDIR": str(place / "tmp")}
    with running(place, world.environment(place / "cache") | own | folders) as client:
        yield Service(client, place)


@pytest.fixture(scope="module")
def local(service: Service) -> np.ndarray:
    """What the two SDXL files draw when the server has them itself."""
    return service.client.images(**QUICK, **SDXL)[0]


def drawn(answer: dict[str, Any]) -> np.ndarray:
    assert answer["status"] == "succeeded", answer["error"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["output"][0].partition(",")[2]))))


def data_uri(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


# Good requests.

PAIR = {"content_lora": "hf:o/dog", "style_lora": "https://civitai.com/models/1"}


def test_two_authorities_loras_are_fused_and_come_from_the_cache_the_next_time(
    service: Service, world: World, local: np.ndarray
) -> None:
    """T1, C1: one page's model has another number than its version."""
    answer = service.client.predict(**QUICK, **PAIR)
    assert np.array_equal(drawn(answer), local)
    assert 0 < answer["metrics"]["style_share"] < 1
    assert f"hf:o/dog: fetched, {len(world.files['sdxl_content'])} bytes" in answer["logs"]
    assert "civitai:models/1: made for 'SDXL 1.0', as its page says" in answer["logs"]
    before = world.asked()
    again = service.client.predict(**QUICK, **PAIR)
    assert np.array_equal(drawn(again), local)
    assert world.asked() == before
    assert "hf:o/dog: hit" in again["logs"] and "civitai:models/1: hit" in again["logs"]


@pytest.mark.parametrize("style", ["replicate:o/oil", "o/oil", "https://replicate.com/o/oil", "data", "tar", "signed"])
def test_every_kind_of_reference_draws_what_its_file_draws(
    service: Service, world: World, local: np.ndarray, style: str
) -> None:
    """R1, D1."""
    content = world.files["sdxl_style"]
    made = {
        "data": lambda: data_uri(content),
        "tar": lambda: data_uri(tarred({"lora.safetensors": content})),
        "signed": lambda: world.storage.signed("/any/oil.safetensors", content),
    }
    reference = made[style]() if style in made else style
    answer = service.client.predict(**QUICK, content_lora=SDXL["content_lora"], style_lora=reference)
    assert np.array_equal(drawn(answer), local)
    assert style != "o/oil" or "o/oil is replicate:o/oil" in answer["logs"]


def test_the_tar_of_flux_fine_tuner_chooses_flux(service: Service) -> None:
    """R2."""
    remote = service.client.images(**QUICK, content_lora="replicate:o/flux")[0]
    assert np.array_equal(remote, service.client.images(**QUICK, content_lora="flux_content.safetensors")[0])


@pytest.mark.parametrize("reference", ["civitai:25", "hf:o/illustrious"])
def test_the_base_that_a_page_names_is_run_unless_the_request_names_one(service: Service, reference: str) -> None:
    local = SDXL["style_lora"]
    meant = service.client.images(**QUICK, style_lora=local, model="illustrious-xl")[0]
    other = service.client.images(**QUICK, style_lora=local, model="sdxl")[0]
    assert not np.array_equal(meant, other)
    for _ in range(2):  # fetched, and from the cache
        assert np.array_equal(service.client.images(**QUICK, style_lora=reference)[0], meant)
    assert np.array_equal(service.client.images(**QUICK, style_lora=reference, model="sdxl")[0], other)


def test_a_word_that_only_its_page_names_calls_a_lora_unless_the_prompt_has_one(service: Service, world: World) -> None:
    answer = service.client.predict(**QUICK, style_lora="civitai:23")
    assert "civitai:23: called by 'zork style', 'sks', as its page says" in answer["logs"]
    assert answer["metrics"]["triggers_added"] == "zork style"
    spoken = QUICK | {"prompt": f"zork style, {QUICK['prompt']}"}
    assert np.array_equal(drawn(answer), service.client.images(**spoken, style_lora=SDXL["style_lora"])[0])
    for given in ({"prompt": "a SKS dog"}, {"add_triggers": False}):
        assert "triggers_added" not in service.client.predict(**QUICK | given, style_lora="civitai:23")["metrics"]


def test_of_what_the_lines_of_a_file_name_it_is_known_what_its_pages_say(service: Service) -> None:
    lines = "".join(f'{{"prompt": "a dog", "style_lora": "civitai:{version}"}}\n' for version in (23, 24))
    prompts = {"prompt": "{}", "model": "sdxl", "prompts": data_uri(lines.encode())}
    answer = service.client.predict(**QUICK | prompts)
    assert tar_of(answer)["00000.txt"] == b"zork style, a dog"
    assert "line 2: style_lora: civitai:24 was made for 'Flux.1 D', as its page says. " in answer["logs"]


# Refusals.

GATED = "hf:o/gated is private or gated, or there is no such repository, and no token was given. Expected "
REFUSED = {
    "missing": ({"style_lora": "civitai:99"}, "civitai:99 is not on CivitAI. Expected "),
    "no such repository": ({"style_lora": "hf:o/none"}, "hf:o/none is private or gated, or there is no such"),
    "gated": ({"content_lora": "hf:o/gated"}, GATED),
    "not anybodys": (
        {"style_lora": "nobody/nothing"},
        "replicate:nobody/nothing is not on Replicate, and hf:nobody/nothing is private or gated, or ",
    ),
    "members only": ({"style_lora": "civitai:21"}, "civitai:21 is for members only, or not for everybody yet, and no "),
    "private": ({"style_lora": "replicate:o/private"}, "replicate:o/private is private, and no token was given."),
    "wrong pin": ({"content_lora": f"hf:o/dog#sha256={'0' * 64}"}, "hf:o/dog has the sha256 "),
    "wrong pin of data": ({"content_lora": f"data:;base64,AgAAAAAAAAB7fQ==#sha256={'0' * 64}"}, "content_lora: 'data"),
    "no LoRA of ours": ({"style_lora": "civitai:22"}, "civitai:22 was made for 'SD 1.5', as its page says. Expected "),
    "another family": (
        {"style_lora": "civitai:24", "model": "sdxl"},
        "civitai:24 was made for 'Flux.1 D', as its page says. Expected a LoRA for sdxl.",
    ),
    "inside": ({"style_lora": "https://169.254.169.254/x.safetensors"}, "The server has no public address. Expected "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_reference_is_refused_in_one_sentence_and_the_next_request_is_right(
    service: Service, world: World, local: np.ndarray, case: str
) -> None:
    """H2, H4, C4, C9, T3; and whatever the operator's own login could open stays shut."""
    given, sentence = REFUSED[case]
    fetched = len(world.storage.requests)
    blobs = sorted((service.cache / "blobs").iterdir()) if service.cache.exists() else []
    said = service.client.error(**QUICK | given)
    assert f": {sentence}" in said, said  # behind what Cog puts before every error
    assert " Expected " in said and "Traceback" not in said and "\n" not in said
    assert len(world.storage.requests) == fetched
    assert not blobs or sorted((service.cache / "blobs").iterdir()) == blobs
    assert np.array_equal(service.client.images(**QUICK, **PAIR)[0], local)


# Secrets.


def spellings(secret: str) -> set[bytes]:
    """As they are, encoded for a URL, and in base64 at each of its three places."""
    encoded = {base64.b64encode(b"x" * n + secret.encode())[4 if n else 0 : -4] for n in range(3)}
    return {secret.encode(), quote(secret, safe="").encode(), *encoded}


@contextmanager
def command_lines() -> Iterator[set[bytes]]:
    """Every command line of this machine that is seen while the block runs."""
    seen: set[bytes] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def written(place: Path) -> Iterator[bytes]:
    """The name and the content of every file below a place, the server's log among them."""
    for path in place.rglob("*"):
        yield str(path).encode()
        if path.is_file():
            yield path.read_bytes()


def test_no_token_and_no_signature_is_found_anywhere_afterwards(service: Service, world: World) -> None:
    """X1, C7, C11, H10: over requests that succeed, that are refused, and whose server fails."""
    content = world.files["sdxl_content"]
    signed = world.storage.signed("/canary/dog.safetensors", content)
    signature = signed.partition(f"{SIGNATURE}=")[2]
    wrong = dict.fromkeys(TOKENS, "hf_Canary+Nobody/4=")
    answers = []
    with command_lines() as seen:
        for given in (
            {"content_lora": "hf:o/gated", "style_lora": "civitai:21"},
            {"content_lora": "hf:o/private", "style_lora": "replicate:o/private"},
            {"content_lora": signed, "style_lora": "nobody/nothing"},
            {"content_lora": signed},
            {"content_lora": f"{signed[:-1]}x"},
            {"content_lora": f"{world.storage.url}/none.safetensors?token={quote(ANN)}"},
        ):
            answers += [service.client.predict(**QUICK, **given, **tokens) for tokens in (TOKENS, wrong)]
        world.hub.failing = 503
        answers.append(service.client.predict(**QUICK, content_lora="hf:o/other", **TOKENS))
        world.hub.failing = None
    statuses = [answer["status"] for answer in answers]
    assert statuses == ["succeeded", "failed"] * 2 + ["failed"] * 2 + ["succeeded"] * 2 + ["failed"] * 5
    told = [json.dumps({name: part for name, part in answer.items() if name != "input"}) for answer in answers]
    images = [base64.b64decode(uri.partition(",")[2]) for answer in answers for uri in answer.get("output") or ()]
    everything = b"\0".join([*map(str.encode, told), *images, *seen, *written(service.place)])
    assert b"cog.server.http" in everything and b"hf:o/gated: fetched" in everything  # so that it was looked through
    secrets = (*TOKENS.values(), *wrong.values(), signature, f"{signature[:-1]}x", OPERATOR)
    assert not [spelling for secret in secrets for spelling in spellings(secret) if spelling in everything]
    assert b"Canary" not in everything
    assert not world.storage.tokens()
    assert world.hub.tokens() <= {ANN, wrong["hf_api_token"]}


# The command.


@pytest.fixture
def shell(world: World, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and a cache of its own."""
    for name, value in (world.environment(tmp_path / "cache") | {"KLORA_MODELS": str(bases)}).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "CIVITAI_API_TOKEN", "REPLICATE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def klora(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize(
    ("reference", "role", "fits"),
    [
        ("hf:o/dog", "sdxl_content", "sdxl, illustrious-xl"),
        ("civitai:20", "sdxl_style", "sdxl, illustrious-xl"),
        ("data", "flux_style", "flux-dev"),
    ],
)
def test_the_command_inspects_what_a_reference_names(
    shell: Path, world: World, reference: str, role: str, fits: str
) -> None:
    content = world.files[role]
    shown = klora("inspect", data_uri(content) if reference == "data" else reference)
    assert shown.exit_code == 0, shown.output
    assert hashlib.sha256(content).hexdigest() in shown.stdout
    assert f"fits      {fits}" in shown.stdout


def test_the_command_inspects_even_what_no_base_runs(shell: Path, world: World) -> None:
    """What a page says keeps nobody from looking."""
    assert "fits      flux-dev" in klora("inspect", "civitai:24").stdout


def test_the_command_uses_the_login_of_its_user(shell: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = klora("inspect", "hf:o/gated")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"Error: lora: {GATED}") and refused.stderr.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", ANN)
    assert klora("inspect", "hf:o/gated").exit_code == 0


def test_the_command_draws_what_the_server_draws(shell: Path, local: np.ndarray) -> None:
    options = ("--seed", "7", "--num-inference-steps", "4", "--output-format", "png")
    loras = ("--content-lora", PAIR["content_lora"], "--style-lora", PAIR["style_lora"])
    for _ in range(2):  # fetched, and from the cache
        shown = klora("fuse", QUICK["prompt"], *options, *loras)
        assert shown.exit_code == 0, shown.output
        assert np.array_equal(np.asarray(Image.open(shell / "out" / "klora_7_0.png")), local)


def test_the_command_refuses_in_one_line(shell: Path, world: World) -> None:
    fetched = len(world.storage.requests)
    for reference, sentence in (
        ("civitai:99", "style_lora: civitai:99 is not on"),
        ("civitai:22", "style_lora: civitai:22 was made for 'SD 1.5'"),
    ):
        refused = klora("fuse", "a dog", "--style-lora", reference)
        assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert refused.stderr.startswith(f"Error: {sentence}")
    assert len(world.storage.requests) == fetched and not (shell / "out").exists()
