"""A reference is asked of its own authority with its own token, a bare name of Replicate first; the log says which."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from klora.errors import SourceError
from klora.sources.authorities import Authorities
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.kinds import Data, Local, Reference
from klora.sources.reference import parse
from test_folder.fakes import CONTENT, Memory, Storage, network, refused
from test_folder.fakes.civitai import Civitai, File
from test_folder.fakes.hub import Hub
from test_folder.fakes.replicate import Replicate

TOKENS = {"hf": "hf_Canary", "civitai": "civitai_Canary", "replicate": "r8_Canary"}

Resolve = Callable[..., Download]


@dataclass
class World:
    storage: Storage
    hub: Hub
    civitai: Civitai
    replicate: Replicate

    @property
    def authorities(self) -> Authorities:
        net = network(self.storage, self.hub, self.civitai, self.replicate)
        return Authorities(self.hub.url, self.civitai.url, self.replicate.url, net, max_bytes=len(CONTENT))

    def asked(self) -> dict[str, set[str | None]]:
        """The tokens that each was shown, of those that were asked at all."""
        servers = {"hub": self.hub, "civitai": self.civitai, "replicate": self.replicate, "storage": self.storage}
        shown = {name: {request.token for request in server.requests} for name, server in servers.items()}
        return {name: tokens for name, tokens in shown.items() if tokens}


@pytest.fixture
def world(storage: Storage) -> Iterator[World]:
    with ExitStack() as stack:
        hub, civitai = stack.enter_context(Hub(storage)), stack.enter_context(Civitai(storage))
        hub.tokens_issued, civitai.tokens_issued = {TOKENS["hf"]}, {TOKENS["civitai"]}
        yield World(storage, hub, civitai, stack.enter_context(Replicate()))


@pytest.fixture
def resolve(world: World) -> Resolve:
    def resolved(text: str, tokens: Mapping[str, str] | None = None) -> Download:
        with Deadline(20) as deadline:
            [found] = world.authorities.resolve(parse(text), tokens or {}, deadline)
        return found

    return resolved


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("hf:o/m", {"hub": {TOKENS["hf"]}}),
        ("civitai:9", {"civitai": {TOKENS["civitai"]}}),
        ("replicate:o/m", {"replicate": {TOKENS["replicate"]}}),
        ("{storage}", {"storage": {None}}),
    ],
)
def test_a_reference_is_asked_of_its_own_authority_with_its_own_token(
    world: World, resolve: Resolve, text: str, asked: dict[str, set[str | None]]
) -> None:
    address = world.storage.signed("/x.safetensors", CONTENT)
    world.hub.publish("o/m", {"x.safetensors": CONTENT})
    world.civitai.publish(1, 9, File(1, content=CONTENT))
    world.replicate.weights["o/m"] = address
    assert resolve(text.format(storage=address), TOKENS)
    assert world.asked() == asked


@pytest.mark.parametrize("reference", [Local("x.safetensors"), Data("0" * 64, b"")])
def test_what_needs_no_authority_is_asked_of_none(world: World, reference: Reference) -> None:
    with pytest.raises(TypeError, match="nobody is asked about"), Deadline(20) as deadline:
        world.authorities.resolve(reference, {}, deadline)


def test_a_download_comes_through_the_same_network_and_bound(world: World, resolve: Resolve) -> None:
    found, memory = replace(resolve(world.storage.signed("/x.safetensors", CONTENT)), size=None), Memory()
    with Deadline(20) as deadline:
        world.authorities.fetch(found, memory, deadline)
        assert memory.data == CONTENT
        with pytest.raises(SourceError, match=f"Expected at most {len(CONTENT) - 1}"):
            replace(world.authorities, max_bytes=len(CONTENT) - 1).fetch(found, memory, deadline)


def test_what_is_larger_than_a_lora_may_be_is_refused_before_anybody_makes_room(world: World, resolve: Resolve) -> None:
    """Room is made of what others use, and a page may say any size."""
    world.hub.publish("o/m", {"x.safetensors": CONTENT + b" "})
    with pytest.raises(
        SourceError, match=f"x.safetensors is {len(CONTENT) + 1} bytes.* Expected at most {len(CONTENT)}"
    ):
        resolve("hf:o/m", {})
    assert world.asked().keys() == {"hub"}


# A bare name.


@pytest.mark.parametrize(
    ("on_replicate", "on_hub", "meant"), [(True, True, "replicate"), (True, False, "replicate"), (False, True, "hf")]
)
def test_a_bare_name_is_replicates_model_if_there_is_one_and_the_log_says_which(
    world: World, resolve: Resolve, caplog: pytest.LogCaptureFixture, on_replicate: bool, on_hub: bool, meant: str
) -> None:
    caplog.set_level(logging.INFO, "klora.sources.authorities")
    if on_replicate:
        world.replicate.weights["o/m"] = world.storage.signed("/x.tar", CONTENT)
    if on_hub:
        world.hub.publish("o/m", {"x.safetensors": CONTENT})
    assert resolve("o/m").key.startswith("hf:o/m@" if meant == "hf" else world.storage.url)
    assert caplog.messages == [f"o/m is {meant}:o/m"]
    assert list(world.asked()) == (["hub", "replicate"] if meant == "hf" else ["replicate"])


def test_each_of_the_two_is_shown_its_own_token_alone(world: World, resolve: Resolve) -> None:
    world.hub.publish("o/m", {"x.safetensors": CONTENT}, readers={TOKENS["hf"]})
    assert resolve("o/m", TOKENS).credential
    assert world.asked() == {"hub": {TOKENS["hf"]}, "replicate": {TOKENS["replicate"]}}


def test_a_pin_stays_with_either_meaning(world: World, resolve: Resolve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "klora.sources.authorities")
    world.hub.publish("o/m", {"x.safetensors": CONTENT})
    resolve(f"o/m#sha256={'0' * 64}")
    assert caplog.messages == [f"o/m#sha256={'0' * 64} is hf:o/m#sha256={'0' * 64}"]


def test_a_name_that_neither_knows_says_how_to_name_either(world: World, resolve: Resolve) -> None:
    """The hub tells only whoever shows a token that there is no such repository."""
    assert refused(resolve, NotFound, "o/m", TOKENS) == (
        "o/m is neither a model that was trained on Replicate nor a Hugging Face repository. "
        "Expected replicate:owner/name or hf:owner/name."
    )
    assert refused(resolve, Denied, "o/m").startswith(
        "replicate:o/m is not on Replicate, and hf:o/m is private or gated, or there is no such repository, and no "
    )


def test_a_private_model_of_replicates_is_not_looked_for_elsewhere(world: World, resolve: Resolve) -> None:
    world.hub.publish("o/m", {"x.safetensors": CONTENT})
    world.replicate.weights["o/m"] = world.storage.signed("/x.tar", CONTENT)
    world.replicate.readers["o/m"] = {TOKENS["replicate"]}
    sentence = refused(resolve, Denied, "o/m")
    assert sentence.startswith("replicate:o/m is private, and no token was given.")
    assert sentence.endswith(" Or hf:o/m, where Hugging Face's is meant.")
    assert list(world.asked()) == ["replicate"]
    assert resolve("o/m", TOKENS).credential


def test_where_replicate_does_not_answer_the_other_meaning_is_named_and_not_taken(
    world: World, resolve: Resolve
) -> None:
    world.hub.publish("o/m", {"x.safetensors": CONTENT})
    world.replicate.failing = 503
    with pytest.raises(Unreachable, match=r" Try again later\. Or hf:o/m, where Hugging Face's is meant\.$"):
        resolve("o/m")
    assert list(world.asked()) == ["replicate"]
