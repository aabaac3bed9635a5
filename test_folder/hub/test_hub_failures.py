"""A hub that fails, lies or makes no sense."""

from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources.download import NotFound, Unreachable
from klora.sources.kinds import HubFile
from klora.sources.network import Network
from test_folder.fakes import CONTENT, fetched, refused
from test_folder.fakes.hub import Hub, Repository
from test_folder.hub.readers import ANN, Resolve


@pytest.mark.parametrize("text", ["hf:o/nowhere", "hf:o/m@nowhere"])
def test_what_is_not_there_is_said_to_be_so(authority: Hub, resolve: Resolve, text: str) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT})
    assert refused(resolve, NotFound, text, ANN).startswith(f"{text} is not on Hugging Face")


def test_a_hub_that_fails_is_asked_again_and_then_unreachable(authority: Hub, resolve: Resolve) -> None:
    authority.failing = 503
    with pytest.raises(Unreachable):
        resolve("hf:o/m")
    assert len(authority.requests) > 1


@pytest.mark.parametrize("claim", [{"sha256": "0" * 64, "size": 1, "pointerSize": 1}, None], ids=["H5", "H6"])
def test_bytes_that_are_not_what_the_hub_says_are_refused(
    authority: Hub, resolve: Resolve, net: Network, claim: dict[str, Any] | None
) -> None:
    claims: dict[str, Any] = {"lfs": claim} if claim else {"size": len(CONTENT) + 1}
    authority.publish("o/m", {"x.safetensors": CONTENT}, claims={"x.safetensors": claims})
    [found] = resolve("hf:o/m")
    with pytest.raises(SourceError, match=r"sha256 is another|bytes long"):
        fetched(found, net)


@pytest.mark.parametrize("told", [{"size": "many"}, {"size": float("inf")}, {"lfs": "none"}, {"lfs": [1]}])
def test_an_answer_that_makes_no_sense_is_the_hubs_fault(
    authority: Hub, resolve: Resolve, told: dict[str, Any]
) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT}, claims={"x.safetensors": told})
    with pytest.raises(Unreachable, match=r"^Hugging Face gave an answer that cannot be understood"):
        resolve("hf:o/m")


@pytest.mark.parametrize("sha", ["main", "../../other/repository", "0" * 39, "0" * 41])
def test_a_commit_that_is_none_is_the_hubs_fault(authority: Hub, resolve: Resolve, sha: str) -> None:
    """It becomes a part of an address and of a key."""
    repository = authority.repositories.setdefault("o/m", Repository())
    repository.branches["main"], repository.commits[sha] = sha, {"x.safetensors": CONTENT}
    with pytest.raises(Unreachable, match=r"^Hugging Face gave an answer that cannot be understood"):
        resolve("hf:o/m")


@pytest.mark.parametrize(
    "card",
    [None, [], "text", {"base_model": 3, "instance_prompt": {}}, {"base_model": [None]}, {"base_model": "x" * 3000}],
)
def test_a_card_that_makes_no_sense_says_nothing(authority: Hub, resolve: Resolve, card: Any) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT}, card=card)
    [found] = resolve("hf:o/m")
    assert (found.base_model, found.triggers) == (None, ())


@pytest.mark.parametrize(
    ("path", "name"),
    {
        "ünï cödé.safetensors": "_n_c_d_.safetensors",
        f"{'x' * 100}.safetensors": f"{'x' * 68}.safetensors",
        ".hidden.safetensors": "hidden.safetensors",
        "a/-rf;$(x).safetensors": "rf_x_.safetensors",
    }.items(),
)
def test_a_name_is_plain_whatever_the_file_is_called(
    authority: Hub, resolve: Resolve, net: Network, path: str, name: str
) -> None:
    authority.publish("o/m", {path: CONTENT})
    [found] = resolve(str(HubFile("o/m", path=path)))
    assert found.name == name
    assert fetched(found, net) == CONTENT
