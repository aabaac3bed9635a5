"""Who may read a repository gets it, with no token but the request's own."""

import logging
import threading
from pathlib import Path

import pytest

from klora.sources.download import Denied, NotFound
from klora.sources.network import Network
from test_folder.fakes import CONTENT, SIGNATURE, fetched, refused
from test_folder.fakes.hub import Hub
from test_folder.hub.readers import ANN, BOB, Resolve


@pytest.mark.parametrize("revision", ["", "@{commit}"])
def test_a_private_repository_is_for_its_readers(authority: Hub, resolve: Resolve, revision: str) -> None:
    """H1: A may; B with none, with another or with a wrong token may not, nor by the commit."""
    commit = authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN})
    text = "hf:o/m" + revision.format(commit=commit)
    [found] = resolve(text, ANN)
    assert found.credential and found.headers == {"Authorization": f"Bearer {ANN}"}
    assert ANN not in f"{found!r} {found.key} {found.url}"
    assert "no token was given" in refused(resolve, Denied, text, None)
    assert "the token that was given may not" in refused(resolve, Denied, text, "hf_wrong")
    refused(resolve, NotFound, text, BOB)


@pytest.mark.parametrize(("token", "seen"), [(None, "no token was given"), (BOB, "the token that was given may not")])
def test_a_gated_repository_says_to_accept_its_licence(
    authority: Hub, resolve: Resolve, token: str | None, seen: str
) -> None:
    """H2."""
    authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN}, gated=True)
    sentence = refused(resolve, Denied, "hf:o/m", token)
    assert seen in sentence and "accepted the licence at huggingface.co/o/m." in sentence
    [found] = resolve("hf:o/m", ANN)
    assert found.credential


def test_a_gated_repository_with_a_new_name_is_as_gated_under_its_old_one(
    authority: Hub, resolve: Resolve, net: Network
) -> None:
    authority.publish("o/new", {"x.safetensors": CONTENT}, readers={ANN}, gated=True)
    authority.renamed["o/old"] = "o/new"
    [found] = resolve("hf:o/old", ANN)
    assert fetched(found, net) == CONTENT
    refused(resolve, Denied, "hf:o/old", BOB)


def test_a_token_that_is_withdrawn_is_refused_the_next_time(authority: Hub, resolve: Resolve) -> None:
    """H3, as far as asking again finds it: from a public repository, a private one, and a gated one."""
    authority.publish("o/public", {"x.safetensors": CONTENT})
    for gated in (False, True):
        authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN}, gated=gated)
        assert resolve("hf:o/m", ANN)
        authority.repositories["o/m"].readers = set()
        with pytest.raises((Denied, NotFound)):
            resolve("hf:o/m", ANN)
    authority.tokens_issued.remove(ANN)
    refused(resolve, Denied, "hf:o/public", ANN)


def test_the_machines_own_token_is_never_used(
    authority: Hub, resolve: Resolve, net: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """H4: not from the environment, not from a login, not from .netrc."""
    host = authority.host.partition(":")[0]
    (tmp_path / "token").write_text(ANN)
    (tmp_path / ".netrc").write_text(f"machine {host} login me password {ANN}\n")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, ANN)
    for name in ("HF_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    authority.publish("o/private", {"x.safetensors": CONTENT}, readers={ANN})
    authority.publish("o/public", {"x.safetensors": CONTENT})
    refused(resolve, Denied, "hf:o/private", None)
    [found] = resolve("hf:o/public", None)
    assert fetched(found, net) == CONTENT
    assert not found.credential and not found.headers
    assert authority.requests and not authority.tokens()


def test_two_users_at_once_get_what_each_may_read(authority: Hub, resolve: Resolve, tmp_path: Path) -> None:
    """H11: nothing is kept between calls."""
    for owner, token in (("ann", ANN), ("bob", BOB)):
        authority.publish(f"{owner}/m", {"x.safetensors": CONTENT}, readers={token})
    found: list[str | None] = []

    def ask(text: str, token: str) -> None:
        for _ in range(5):
            found.extend(download.headers["Authorization"] for download in resolve(text, token))

    threads = [threading.Thread(target=ask, args=args) for args in (("hf:ann/m", ANN), ("hf:bob/m", BOB))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == [f"Bearer {ANN}"] * 5 + [f"Bearer {BOB}"] * 5
    by_path = {request.path.split("/")[3]: request.token for request in authority.requests}
    assert by_path == {"ann": ANN, "bob": BOB}


@pytest.mark.parametrize("token", ["hf_Canary\r\nX-Other: 1", "hf_Canary é", "hf_Canary hf_Canary", "h" * 1001])
def test_what_cannot_be_a_token_is_sent_nowhere_and_not_repeated(authority: Hub, resolve: Resolve, token: str) -> None:
    with pytest.raises(Denied, match=r"^The token for Hugging Face holds ") as error:
        resolve("hf:o/m", token)
    assert "Canary" not in str(error.value) and "hhhh" not in str(error.value)
    assert not authority.requests


@pytest.mark.parametrize("token", ["", "  ", f" {ANN}\n"])
def test_space_around_a_token_is_none_of_it(authority: Hub, resolve: Resolve, token: str) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT})
    [found] = resolve("hf:o/m", token)
    assert found.headers == ({"Authorization": f"Bearer {ANN}"} if token.strip() else {})
    assert found.credential == bool(token.strip())


def test_nothing_of_a_token_or_a_signed_link_is_logged(
    authority: Hub, resolve: Resolve, net: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """X1."""
    caplog.set_level(logging.DEBUG)
    authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN}, gated=True)
    fetched(resolve("hf:o/m", ANN)[0], net)
    refused(resolve, Denied, "hf:o/m", BOB)
    assert "fetched" in caplog.text
    assert "Canary" not in caplog.text and SIGNATURE not in caplog.text
