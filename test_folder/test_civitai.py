"""A CivitAI reference comes to one file of one version, as its API tells; tokens travel in headers, to it alone."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources import civitai
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.kinds import CivitaiFile
from klora.sources.network import Network
from klora.sources.reference import parse
from test_folder.fakes import CONTENT, SIGNATURE, Reply, Storage, fetched, refused
from test_folder.fakes.civitai import Civitai, File

DIGEST = hashlib.sha256(CONTENT).hexdigest()
MEMBER, BUYER, STRANGER = "MembersCanary", "BuyersCanary", "StrangersCanary"

Resolve = Callable[..., Download]


@pytest.fixture
def authority(storage: Storage) -> Iterator[Civitai]:
    with Civitai(storage) as authority:
        authority.tokens_issued = {MEMBER, BUYER}
        authority.buyers = {BUYER}
        yield authority


@pytest.fixture
def resolve(authority: Civitai, net: Network) -> Resolve:
    """What a reference, as people write it, comes to."""

    def resolved(text: str, token: str | None = None) -> Download:
        reference = parse(text)
        assert isinstance(reference, CivitaiFile)
        with Deadline(20) as deadline:
            [download] = civitai.resolve(reference, token, authority.url, net, deadline)
        return download

    return resolved


# What is found.


def test_a_version_is_known_before_it_is_fetched(authority: Civitai, resolve: Resolve) -> None:
    file = File(7, "Pony Style.safetensors", CONTENT, primary=True, metadata={"size": "full", "fp": "fp16"})
    authority.publish(1, 20, file, baseModel="SDXL 1.0", trainedWords=["pony style", "sks"], usageControl="Download")
    assert resolve("civitai:20") == Download(
        key="civitai:20+7",
        name="Pony_Style.safetensors",
        url=f"{authority.url}/api/download/models/20?type=Model&format=SafeTensor&size=full&fp=fp16",
        headers={"Content-Type": "application/json"},
        size=len(CONTENT),
        sha256=DIGEST,
        base_model="SDXL 1.0",
        triggers=("pony style", "sks"),
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("https://civitai.com/models/20", 31),
        ("https://civitai.red/models/20/a-slug", 31),
        ("urn:air:sdxl:lora:civitai:20", 31),
        ("https://civitai.com/models/20?modelVersionId=30", 30),
        ("sdxl:lora:civitai:20@30", 30),
        ("civitai:20", 20),
        ("https://civitai.green/api/download/models/20", 20),
    ],
)
def test_a_models_number_is_no_versions_number(
    authority: Civitai, resolve: Resolve, net: Network, text: str, version: int
) -> None:
    """C1, C2, C3: there is a version of the same number, and it is of another model."""
    for model, number in ((9, 20), (20, 30), (20, 31)):
        authority.publish(model, number, File(number * 10, content=CONTENT + b"%d" % number, primary=True))
    found = resolve(text)
    assert found.key == f"civitai:{version}+{version}0"
    assert fetched(found, net).endswith(b"%d" % version)


@pytest.mark.parametrize(
    ("newest_first", "chosen"),
    [
        (("ZImageTurbo", "Qwen", "Flux.1 D", "SDXL 1.0"), 2),
        (("Other", "Flux.1 D"), 0),
        ((None, "Flux.1 D"), 0),
        (("ZImageTurbo", "SD 1.5"), 0),
    ],
)
def test_of_a_models_versions_the_newest_counts_that_may_be_for_a_family_of_ours(
    authority: Civitai, resolve: Resolve, newest_first: tuple[str | None, ...], chosen: int
) -> None:
    numbers = range(100, 100 - len(newest_first), -1)
    for number, said in zip(reversed(numbers), reversed(newest_first), strict=True):
        authority.publish(7, number, File(number, content=CONTENT), baseModel=said)
    assert resolve("civitai:models/7").key.startswith(f"civitai:{numbers[chosen]}+")
    assert resolve("civitai:models/7").base_model == newest_first[chosen]


def test_a_rounded_size_is_no_size(authority: Civitai, resolve: Resolve) -> None:
    for number, kilobytes, size in ((1, 1.5, 1536), (2, 0.3, None), (3, None, None), (4, 0, None)):
        authority.publish(1, number, File(number, content=CONTENT, claims={"sizeKB": kilobytes}))
        assert resolve(f"civitai:{number}").size == size


# Which file of a version.

PRUNED = File(1, "pruned.safetensors", b"1", metadata={"size": "pruned", "fp": "fp16"})
FULL = File(2, "full.safetensors", b"2", primary=True, metadata={"size": "full", "fp": "fp32"})
DATA = File(3, "data.zip", b"3", kind="Training Data", format="Other")
PICKLE = File(4, "old.ckpt", b"4", primary=True, format="PickleTensor")
ARCHIVE = File(5, "all.zip", b"5", kind="Archive", format="Other", primary=True)
UNKNOWN = File(6, "what.safetensors", b"6", format=None)
OTHER = File(7, "vae.safetensors", b"7", kind="VAE", primary=True)


@pytest.mark.parametrize(
    ("files", "text", "number"),
    [
        ([PRUNED, FULL], "civitai:9", 2),
        ([PRUNED, FULL], "civitai:9+1", 1),
        ([PRUNED, FULL], "civitai:9?size=pruned", 1),
        ([PRUNED, FULL], "civitai.com/api/download/models/9?type=Model&format=SafeTensor&fp=FP16", 1),
        ([DATA, PRUNED], "civitai:9", 1),
        ([OTHER, PRUNED], "civitai:9", 1),
        ([PICKLE, PRUNED], "civitai:9", 1),
        ([ARCHIVE, UNKNOWN, PRUNED], "urn:air:sdxl:lora:civitai:1@9+1", 1),
    ],
)
def test_the_file_is_the_primary_one_that_is_a_model_or_the_one_that_is_named(
    authority: Civitai, resolve: Resolve, files: list[File], text: str, number: int
) -> None:
    authority.publish(1, 9, *files)
    assert resolve(text).key == f"civitai:9+{number}"


@pytest.mark.parametrize(
    ("files", "text", "why"),
    [
        ([PICKLE], "civitai:9", "has no LoRA in safetensors: +4 'old.ckpt' (Model, PickleTensor)."),
        ([PICKLE, PRUNED], "civitai:9+4", "has no LoRA in safetensors"),
        ([ARCHIVE], "civitai:9", "has no LoRA in safetensors"),
        ([DATA, UNKNOWN], "civitai:9", "has no LoRA in safetensors"),
        ([OTHER], "civitai:9", "has no LoRA in safetensors"),
        ([FULL], "civitai:9+8", "has no LoRA in safetensors"),
        ([FULL], "civitai:9?fp=bf16", "has no LoRA in safetensors"),
        ([], "civitai:9", "has no LoRA in safetensors: no files."),
        ([PRUNED, File(8)], "civitai:9", "Expected + and a file's number"),
    ],
)
def test_a_version_without_the_file_says_what_it_has(
    authority: Civitai, resolve: Resolve, files: list[File], text: str, why: str
) -> None:
    """C10."""
    authority.publish(1, 9, *files)
    assert why in refused(resolve, SourceError, text)
    assert not [request for request in authority.requests if "download" in request.path]


@pytest.mark.parametrize("kind", ["Checkpoint", "TextualInversion", "VAE", "Controlnet"])
def test_what_is_no_lora_is_refused_by_its_kind(authority: Civitai, resolve: Resolve, kind: str) -> None:
    authority.publish(1, 9, FULL, kind=kind)
    assert refused(resolve, SourceError, "civitai:9") == f"civitai:9 is a '{kind}'. Expected a LoRA."


@pytest.mark.parametrize("kind", ["LORA", "LoCon", "DoRA"])
def test_every_kind_of_lora_is_taken(authority: Civitai, resolve: Resolve, kind: str) -> None:
    authority.publish(1, 9, FULL, kind=kind)
    assert resolve("civitai:9")


@pytest.mark.parametrize("usage", ["Generation", "InternalGeneration"])
def test_what_may_not_be_downloaded_is_refused(authority: Civitai, resolve: Resolve, usage: str) -> None:
    authority.publish(1, 9, FULL, usageControl=usage)
    assert "may be used on CivitAI only" in refused(resolve, SourceError, "civitai:9")


# Who may have it.


def test_a_token_travels_in_a_header_and_to_civitai_alone(
    authority: Civitai, resolve: Resolve, storage: Storage, net: Network
) -> None:
    """C7: the storage refuses whoever shows a token."""
    authority.publish(1, 9, File(2, content=CONTENT), members_only=True)
    found = resolve("civitai.com/models/1", MEMBER)
    assert fetched(found, net) == CONTENT
    assert found.credential and MEMBER not in f"{found!r} {found.url} {found.key}"
    assert {request.token for request in authority.requests} == {MEMBER}
    assert not any("token" in request.query for request in authority.requests)
    assert storage.requests and not storage.tokens()


def test_what_is_for_members_asks_for_a_token(authority: Civitai, resolve: Resolve) -> None:
    """C4."""
    authority.publish(1, 9, File(2, content=CONTENT), members_only=True)
    assert "no token was given. Expected the CivitAI token of" in refused(resolve, Denied, "civitai:9")
    assert {request.headers["Content-Type"] for request in authority.requests} == {"application/json"}


def test_a_login_page_is_a_refusal_too(authority: Civitai, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    """C4, of a CivitAI that does not tell JSON from people."""
    monkeypatch.setattr(civitai, "_HEADERS", {})
    authority.publish(1, 9, File(2, content=CONTENT), members_only=True)
    assert "no token was given" in refused(resolve, Denied, "civitai:9")
    assert not [request for request in authority.requests if request.path == "/login"]


def test_a_download_may_lead_on_to_another_of_its_own(
    authority: Civitai, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.publish(1, 9, File(2, content=CONTENT))
    onward = Reply(307, headers={"Location": "/api/download/models/9?type=Model&format=SafeTensor&again=1"})
    monkeypatch.setattr(authority, "_download", lambda *_: onward)
    assert resolve("civitai:9").key == "civitai:9+2"


def test_a_wrong_token_is_refused(authority: Civitai, resolve: Resolve) -> None:
    """C5."""
    authority.publish(1, 9, File(2, content=CONTENT))
    assert "the token that was given may not have it" in refused(resolve, Denied, "civitai:9", STRANGER)


def test_what_is_sold_early_is_for_its_buyers(authority: Civitai, resolve: Resolve) -> None:
    """C6, and a token that no longer may is found out when it is asked again."""
    authority.publish(1, 9, File(2, content=CONTENT), early=True)
    assert "not for everybody yet" in refused(resolve, Denied, "civitai:9", MEMBER)
    assert resolve("civitai:9", BUYER).credential
    authority.buyers = set()
    refused(resolve, Denied, "civitai:9", BUYER)


def test_a_public_file_needs_no_token(authority: Civitai, resolve: Resolve) -> None:
    authority.publish(1, 9, File(2, content=CONTENT))
    assert not resolve("civitai:9").credential
    assert not authority.tokens()


def test_bytes_that_are_not_what_civitai_says_are_refused(authority: Civitai, resolve: Resolve, net: Network) -> None:
    """C8."""
    authority.publish(1, 9, File(2, content=CONTENT, claims={"hashes": {"SHA256": "A" * 64}}))
    with pytest.raises(SourceError, match="sha256 is another"):
        fetched(resolve("civitai:9"), net)


def test_nothing_of_a_token_or_a_signed_link_is_logged(
    authority: Civitai, resolve: Resolve, net: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """C11, X1."""
    caplog.set_level(logging.DEBUG)
    authority.publish(1, 9, File(2, content=CONTENT), members_only=True)
    fetched(resolve("civitai:9", MEMBER), net)
    refused(resolve, Denied, "civitai:9", STRANGER)
    assert "fetched" in caplog.text
    assert "Canary" not in caplog.text and SIGNATURE not in caplog.text


# What goes wrong.


@pytest.mark.parametrize("text", ["civitai:8", "civitai:models/8", "civitai.com/models/8?modelVersionId=9"])
def test_what_is_not_there_is_said_to_be_so(authority: Civitai, resolve: Resolve, text: str) -> None:
    authority.publish(1, 7, FULL)
    assert refused(resolve, NotFound, text).startswith(f"{parse(text)} is not on CivitAI")


def test_a_model_without_versions_is_not_there(authority: Civitai, resolve: Resolve) -> None:
    authority.kinds[5] = "LORA"
    refused(resolve, NotFound, "civitai:models/5")


@pytest.mark.parametrize(
    "facts", [{"model": None}, {"model": {}}, {"files": None}, {"files": [{}]}, {"id": "x"}, {"trainedWords": 3}]
)
def test_an_answer_that_makes_no_sense_is_civitais_fault(
    authority: Civitai, resolve: Resolve, facts: dict[str, Any]
) -> None:
    authority.publish(1, 9, FULL, **facts)
    with pytest.raises(Unreachable, match=r"^CivitAI gave an answer that cannot be understood"):
        resolve("civitai:9")


def test_a_model_that_makes_no_sense_is_civitais_fault(authority: Civitai, resolve: Resolve) -> None:
    authority.publish(1, 9, FULL)
    authority.claims[1] = {"modelVersions": [{}]}
    with pytest.raises(Unreachable, match=r"^CivitAI gave an answer that cannot be understood"):
        resolve("civitai:models/1")
