"""A model trained on Replicate comes to the tar of its weights, wherever its page leads; a new training, a new key."""

from collections.abc import Callable, Iterator

import pytest

from klora.errors import SourceError
from klora.sources import replicate
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.kinds import ReplicateModel, Url
from klora.sources.network import Network
from klora.sources.reference import parse
from test_folder.fakes import SIGNATURE, Storage, refused
from test_folder.fakes.replicate import Replicate

OWNER, STRANGER = "r8_OwnersCanary", "r8_StrangersCanary"

Resolve = Callable[..., Download]


@pytest.fixture
def authority() -> Iterator[Replicate]:
    with Replicate() as authority:
        yield authority


@pytest.fixture
def resolve(authority: Replicate, net: Network) -> Resolve:
    """What a reference, as people write it, comes to."""

    def resolved(text: str, token: str | None = None) -> Download:
        reference = parse(text)
        assert isinstance(reference, ReplicateModel)
        with Deadline(20) as deadline:
            [download] = replicate.resolve(reference, token, authority.url, net, deadline)
        return download

    return resolved


def test_the_tars_address_is_the_key_and_its_signature_is_not(
    authority: Replicate, storage: Storage, resolve: Resolve
) -> None:
    address = storage.signed("/a/trained_model.tar", b"")
    authority.weights["o/m"] = address
    found = resolve("replicate:o/m")
    assert found == Download(key=f"{storage.url}/a/trained_model.tar", name="o-m.tar", url=address)
    assert SIGNATURE in found.url and SIGNATURE not in f"{found!r}"
    assert not storage.requests


def test_a_new_training_is_a_new_key(authority: Replicate, storage: Storage, resolve: Resolve) -> None:
    keys = []
    for n in (1, 2):
        authority.weights["o/m"] = storage.signed(f"/{n}/trained_model.tar", b"")
        keys.append(resolve("replicate.com/o/m").key)
    assert len(set(keys)) == 2


@pytest.mark.parametrize("text", ["replicate:o/m:v1", "o/m/versions/v1", "https://replicate.com/o/m/versions/v1"])
def test_a_version_is_asked_for_by_its_own_page(
    authority: Replicate, storage: Storage, resolve: Resolve, text: str
) -> None:
    authority.weights = {"o/m": f"{storage.url}/new.tar", "o/m:v1": f"{storage.url}/old.tar"}
    assert resolve(text).key == f"{storage.url}/old.tar"
    assert [request.path for request in authority.requests] == ["/o/m/versions/v1/_weights"]


def test_a_page_may_lead_to_another_page_first(authority: Replicate, storage: Storage, resolve: Resolve) -> None:
    authority.moved["/o/old/_weights"] = "/o/m/_weights"
    authority.moved["/o/m/_weights"] = f"{authority.url}/o/m/versions/v/_weights"
    authority.weights["o/m:v"] = f"{storage.url}/x.tar"
    assert resolve("replicate:o/old").key == f"{storage.url}/x.tar"


def test_a_private_model_is_for_its_readers_and_its_tar_sees_no_token(
    authority: Replicate, storage: Storage, resolve: Resolve
) -> None:
    authority.weights["o/m"] = storage.signed("/x.tar", b"")
    authority.readers["o/m"] = {OWNER}
    found = resolve("replicate:o/m", OWNER)
    assert found.credential and not found.headers
    assert "no token was given" in refused(resolve, Denied, "replicate:o/m")
    assert "the token that was given may not" in refused(resolve, Denied, "replicate:o/m", STRANGER)


def test_what_has_no_weights_is_not_there(authority: Replicate, resolve: Resolve) -> None:
    authority.pages.add("/o/page/_weights")
    for text in ("replicate:o/nowhere", "replicate:o/page"):
        assert refused(resolve, NotFound, text).startswith(f"{text} is not on Replicate")


def test_pages_that_lead_in_a_circle_come_to_an_end(authority: Replicate, resolve: Resolve) -> None:
    authority.moved = {"/o/m/_weights": "/a", "/a": "/b", "/b": "/a"}
    assert "from page to page" in refused(resolve, SourceError, "replicate:o/m")
    assert len(authority.requests) == replicate.MAX_PAGES


def test_a_page_that_leads_to_no_address_is_replicates_fault(authority: Replicate, resolve: Resolve) -> None:
    authority.moved["/o/m/_weights"] = "https://[none/x.tar"
    with pytest.raises(Unreachable, match="gave an answer that cannot be understood"):
        resolve("replicate:o/m")


def test_a_tar_that_is_named_itself_has_the_key_that_its_model_has(authority: Replicate, resolve: Resolve) -> None:
    address = "https://replicate.delivery/pbxt/a/trained_model.tar"
    authority.weights["o/m"] = f"{address}?{SIGNATURE}=x"
    named = parse(f"{address}?{SIGNATURE}=y")
    assert isinstance(named, Url)
    assert resolve("replicate:o/m").key == str(named) == address
