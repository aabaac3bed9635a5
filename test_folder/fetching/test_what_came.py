"""What is no LoRA is refused by what it looks like (T7), and no secret is logged (X1)."""

import logging
from dataclasses import replace

import pytest

from klora.errors import SourceError
from klora.file_names import CONFIG
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download
from klora.sources.fetch import fetch
from test_folder.fakes import Memory, network
from test_folder.fakes import fetched as bytes_of
from test_folder.fakes.hostile import Hostile, Ranged, in_turn, redirects, reply
from test_folder.fetching.fetched import fetched, refusal
from test_folder.test_formats import GOOD, KINDS, tar


@pytest.mark.parametrize(("kind", "body"), KINDS)
def test_what_is_no_lora_is_refused_by_what_it_looks_like(kind: str, body: bytes) -> None:
    """T7: a login page and an error under status 200 among them."""
    sink = Memory()
    with Hostile({"/x": reply(body, "Content-Type: application/octet-stream")}) as server, Deadline(20) as deadline:
        with pytest.raises(SourceError) as error:
            fetch(Download("k", "lora.safetensors", server.url("/x")), sink, network(server), deadline, 1 << 20)
        assert type(error.value) is SourceError
        assert str(error.value).startswith(f"lora.safetensors looks like {kind}")
        assert (sink.data, server.connections) == (b"", 1)


def test_an_address_may_end_in_json_and_give_a_lora() -> None:
    """As an API's may; what it gives is told by its bytes, and JSON lies only beside weights, under one name."""
    with Hostile({"/x": reply(GOOD), "/y": reply(b'{"error": "no"}')}) as server:
        lora, answer = (Download("k", "lora.json", server.url(path)) for path in ("/x", "/y"))
        assert bytes_of(lora, network(server)) == GOOD
        with pytest.raises(SourceError, match=r"^lora\.json looks like a JSON answer\. Expected a \.safetensors file"):
            bytes_of(answer, network(server))
        assert bytes_of(replace(answer, name=CONFIG), network(server)) == b'{"error": "no"}'


def test_a_tar_is_taken() -> None:
    body = tar(("output/flux_train_replicate/lora.safetensors", GOOD), ("output/config.yaml", b"a: 1"))
    with Hostile({"/x": reply(body)}) as server:
        assert fetched(server).data == body


@pytest.mark.parametrize("path", ["/login?returnUrl=/x", "/auth/signin", "/users/sign_in", "/Log-In"])
def test_a_page_that_a_login_redirects_to_means_that_a_token_is_wanted(path: str) -> None:
    """As CivitAI answers whoever is not logged in."""
    page = reply(b"<!DOCTYPE html><html>canary</html>")
    with Hostile({"/x": redirects(path), path.partition("?")[0]: page, "/y": redirects("/z"), "/z": page}) as server:
        assert refusal(server, Denied, size=len(GOOD)) == (
            "The server wants a login for x.safetensors. Expected a public file, or a token."
        )
        for other in ("/y", path):  # redirected elsewhere, and not redirected
            assert "perhaps a login page" in refusal(server, path=other, size=len(GOOD))


def test_no_secret_is_in_what_a_fetch_logs(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """X1: at DEBUG, with retries, a redirect and a resumed body."""
    caplog.set_level(logging.DEBUG)
    with Hostile({"/y": Ranged(GOOD, cuts=(2000,))}) as server:
        server.routes = {
            **server.routes,
            "/x": in_turn(reply(b"canary", status=503), redirects(server.url("/y?sig=canary"))),
        }
        fetched(server, "/x?sig=canary", headers={"Authorization": "Bearer canary"})
        assert server.connections == 5
    printed = capfd.readouterr()
    everything = caplog.text + printed.out + printed.err
    assert "Trying again" in everything
    assert f"fetched {len(GOOD)} bytes" in everything
    assert not [secret for secret in ("canary", "sig=", "127.0.0.1") if secret in everything]


def test_a_download_does_not_show_its_secrets() -> None:
    shown = repr(Download("k", "n", "https://a.example/?canary", {"Authorization": "canary"}))
    assert "canary" not in shown
