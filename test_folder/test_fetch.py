"""Files come whole, or the sentence says why not: counted, compared, resumed, recognised (T1, T2, T5-T8 and X1)."""

import hashlib
import logging
import threading
import time
from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources.deadline import Cancelled, Deadline, Patience
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.fetch import fetch
from klora.sources.retries import RETRIES
from test_folder.fakes import Memory, network
from test_folder.fakes.hostile import (
    Behaviour,
    Hostile,
    Ranged,
    drips,
    floods,
    head,
    in_turn,
    redirects,
    reply,
    resets,
    says,
)
from test_folder.test_formats import GOOD, KINDS, safetensors, tar

SHA256 = hashlib.sha256(GOOD).hexdigest()


def fetched(server: Hostile, path: str = "/x", *, seconds: float = 5.0, most: int = 1 << 20, **known: Any) -> Memory:
    """What came; also checks that the sha256 is of that."""
    sink, download = Memory(), Download("url:x", "x.safetensors", server.url(path), **known)
    with Deadline(seconds) as deadline:
        digest = fetch(download, sink, network(server), deadline, most)
    assert digest == hashlib.sha256(sink.data).hexdigest()
    return sink


def refusal(server: Hostile, kind: type[SourceError] = SourceError, path: str = "/x", **known: Any) -> str:
    with pytest.raises(kind) as error:
        fetched(server, path, **known)
    assert type(error.value) is kind or kind is Unreachable
    return str(error.value)


# What comes, and how it is answered for (T1, T2).


@pytest.mark.parametrize(
    "behaviour",
    [
        reply(GOOD),
        says(head(200) + GOOD),
        says(head(200, "Transfer-Encoding: chunked") + f"{len(GOOD):x}\r\n".encode() + GOOD + b"\r\n0\r\n\r\n"),
        says(
            head(200, f"Content-Length: {len(GOOD)}"),
            *(part for n in range(9) for part in (GOOD[n : n + 1], 0.01)),
            GOOD[9:],
        ),
        reply(GOOD, "Content-Type: text/html", 'Content-Disposition: attachment; filename="../../x"'),
    ],
    ids=["with a length", "without", "in chunks", "in small pieces", "under a wrong type and a name that climbs"],
)
def test_a_file_comes_as_it_was_sent(behaviour: Behaviour) -> None:
    """T1, T5, T7."""
    with Hostile({"/x": behaviour}) as server:
        sink = fetched(server, size=len(GOOD), sha256=SHA256, headers={"Authorization": "Bearer t"})
        assert (sink.data, sink.restarts) == (GOOD, 0)
        assert server.requests[0].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("status", "kind"), [(404, NotFound), (410, NotFound), (401, Denied), (403, Denied), (206, SourceError)]
)
@pytest.mark.parametrize("body", [b'{"error": "no"}', b"<html>Log in</html>", GOOD])
def test_a_refused_file_is_told_by_its_status_whatever_comes_with_it(
    status: int, kind: type[SourceError], body: bytes
) -> None:
    """T2: JSON and HTML."""
    with Hostile({"/x": reply(body, status=status)}) as server:
        assert f"answers {status}" in refusal(server, kind)
        assert server.connections == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again_thrice_at_most(status: int) -> None:
    """T2."""
    bad = reply(b"", "Retry-After: 0", status=status)
    with Hostile({"/x": in_turn(bad, bad, bad, reply(GOOD)), "/y": bad}) as server:
        assert fetched(server).data == GOOD
        assert f"answers {status}" in refusal(server, Unreachable, "/y")
        assert len(server.asked("/y")) == 1 + RETRIES


def test_a_retry_waits_as_long_as_it_is_asked_to_but_not_past_the_deadline() -> None:
    """T2."""
    with Hostile({"/x": in_turn(reply(b"", "Retry-After: 1", status=429), reply(GOOD))}) as server:
        start = time.monotonic()
        refusal(server, Unreachable, seconds=0.8)
        assert time.monotonic() - start < 0.75
        server.requests.clear()
        assert fetched(server).data == GOOD
        assert time.monotonic() - start > 1


# Lengths and caps (T5).


@pytest.mark.parametrize("length", [2000, 10**12])
def test_a_declared_length_above_the_cap_is_refused_before_anything_is_written(length: int) -> None:
    sink = Memory()
    with Hostile({"/x": says(head(200, f"Content-Length: {length}") + GOOD)}) as server:
        with (
            pytest.raises(SourceError, match=f"is {length} bytes long. Expected at most 1999"),
            Deadline(5) as deadline,
        ):
            fetch(Download("k", "x", server.url("/x")), sink, network(server), deadline, 1999)
        assert (sink.data, server.connections) == (b"", 1)


@pytest.mark.parametrize(
    "behaviour",
    [
        floods(head(200) + GOOD, b"w" * 65536),
        floods(head(200, "Transfer-Encoding: chunked") + f"{len(GOOD):x}\r\n".encode() + GOOD + b"\r\n",
               b"10000\r\n" + b"w" * 65536 + b"\r\n"),
    ],
    ids=["no length", "chunked"],
)  # fmt: skip
def test_what_has_no_end_is_cut_at_the_cap(behaviour: Behaviour) -> None:
    """T5: 5 GB in chunks, and for ever."""
    sink, told = Memory(), pytest.raises(SourceError, match="does not end after 1000000 bytes")
    with Hostile({"/x": behaviour}) as server, Deadline(5) as deadline, told:
        fetch(Download("k", "x", server.url("/x")), sink, network(server), deadline, 1_000_000)
    assert len(GOOD) < len(sink.data) <= 1_000_000


def test_a_file_of_exactly_the_cap_is_taken() -> None:
    with Hostile({"/x": reply(GOOD), "/y": says(head(200) + GOOD)}) as server:
        for path in ("/x", "/y"):
            assert fetched(server, path, most=len(GOOD)).data == GOOD


@pytest.mark.parametrize("wrong", [-1, 1])
@pytest.mark.parametrize("declared", [True, False])
def test_another_size_than_the_authority_names_is_refused(wrong: int, declared: bool) -> None:
    with Hostile({"/x": reply(GOOD) if declared else says(head(200) + GOOD)}) as server:
        kind = SourceError if declared or wrong < 0 else Unreachable
        refusal(server, kind, size=len(GOOD) + wrong)


def test_another_sha256_than_the_authority_names_is_refused() -> None:
    with Hostile({"/x": reply(GOOD)}) as server:
        assert refusal(server, sha256="0" * 64).startswith("x.safetensors is not the file that was named")
        assert server.connections == 1


@pytest.mark.parametrize("kept", [0, 7, 600, len(GOOD) - 1])
def test_a_body_that_breaks_off_every_time_is_no_file(kept: int) -> None:
    """T5: short, closed at 0 and half-way."""
    with Hostile({"/x": says(head(200, f"Content-Length: {len(GOOD)}") + GOOD[:kept])}) as server:
        assert f"broke off {len(GOOD) - kept} bytes before the end" in refusal(server, Unreachable)
        assert server.connections == 1 + RETRIES


def test_an_empty_body_without_a_length_is_no_file() -> None:
    """T5: missing length, closed at 0."""
    with Hostile({"/x": says(head(200))}) as server:
        assert "looks like an empty file" in refusal(server)


# Resuming (T6, T8).


def test_a_broken_connection_is_taken_up_where_it_broke() -> None:
    """T6: reset in the middle of the body; and broken off."""
    cut = resets(head(200, f"Content-Length: {len(GOOD)}", 'ETag: "1"') + GOOD[:600])
    ranged = Ranged(GOOD, cuts=(0, 2000))
    with Hostile({"/x": in_turn(cut, ranged)}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts) == (GOOD, 0)
        assert [client.headers["Range"] for client in server.requests] == [None, "bytes=600-", "bytes=2000-"]
        assert [client.headers["If-Range"] for client in server.requests] == [None, '"1"', '"1"']


def test_a_file_that_changed_meanwhile_is_not_spliced() -> None:
    changed = safetensors(fill=b"n")
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,)), Ranged(changed, etag='"2"'))}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts) == (changed, 1)


def test_a_server_that_sends_a_changed_file_as_the_rest_is_asked_for_the_whole() -> None:
    """T8: 206 although If-Range names another file."""
    changed = safetensors(fill=b"n")
    said = f"bytes 2000-{len(GOOD) - 1}/{len(GOOD)}"
    lie = says(head(206, f"Content-Length: {len(GOOD) - 2000}", 'ETag: "2"', f"Content-Range: {said}") + changed[2000:])
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,)), lie, Ranged(changed, etag='"2"'))}) as server:
        assert fetched(server).data == changed


def test_a_server_that_knows_no_ranges_sends_it_all_again() -> None:
    """T8."""
    with Hostile({"/x": Ranged(GOOD, cuts=(2000,), obeys=False)}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts, server.connections) == (GOOD, 1, 2)


@pytest.mark.parametrize(
    "claimed",
    [f"bytes 0-{len(GOOD) - 1}/{len(GOOD)}", f"bytes 1999-{len(GOOD) - 1}/{len(GOOD)}", f"bytes 2000-2500/{len(GOOD)}",
     "bytes 2000-3000/*", "bytes */3000", "items 2000-3000/3001", "", "bytes 2000-" + "9" * 5000 + "/1"],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_thrown_away(claimed: str) -> None:
    """T8: 206 with a wrong Content-Range."""
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,)), Ranged(GOOD, claimed=claimed or " "))}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts) == (GOOD, 1)
        assert [client.headers["Range"] for client in server.requests] == [None, "bytes=2000-", None]


@pytest.mark.parametrize("length", ["Content-Length: 500", "X-Nothing: said"])
def test_a_part_that_ends_before_it_says_is_no_end_of_the_file(length: str) -> None:
    """T8: whether the part's length is wrong or left out."""
    said = f"bytes 2000-{len(GOOD) - 1}/{len(GOOD)}"
    short = says(head(206, length, 'ETag: "1"', f"Content-Range: {said}") + GOOD[2000:2500])
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,)), short, Ranged(GOOD))}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts, server.requests[2].headers["Range"]) == (GOOD, 0, "bytes=2500-")


def test_a_part_of_a_file_of_another_length_is_thrown_away() -> None:
    """T8: where no ETag tells, the length may."""
    longer = says(head(206, "Content-Length: 9", "Content-Range: bytes 2000-2008/2009") + b"x" * 9)
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,), etag=None), longer, Ranged(GOOD))}) as server:
        assert fetched(server, sha256=SHA256).data == GOOD


def test_a_file_that_changed_before_anything_was_kept_is_the_new_one() -> None:
    changed = safetensors(4000)
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(100,)), Ranged(changed))}) as server:
        assert fetched(server).data == changed


def test_a_range_that_the_server_cannot_satisfy_begins_anew() -> None:
    """T8."""
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,)), reply(b"", status=416), reply(GOOD))}) as server:
        assert fetched(server).data == GOOD


@pytest.mark.parametrize("etag", [None, 'W/"1"', "1", '"\xe9"'])
def test_without_a_way_to_tell_that_it_is_the_same_file_all_of_it_is_asked_for(etag: str | None) -> None:
    with Hostile({"/x": Ranged(GOOD, cuts=(2000,), etag=etag)}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts, server.requests[1].headers["Range"]) == (GOOD, 1, None)


@pytest.mark.parametrize("etag", [None, 'W/"1"', '"1"'])
def test_a_known_sha256_is_such_a_way(etag: str | None) -> None:
    with Hostile({"/x": Ranged(GOOD, cuts=(2000,), etag=etag)}) as server:
        sink = fetched(server, sha256=SHA256)
        assert (sink.data, sink.restarts, server.requests[1].headers["Range"]) == (GOOD, 0, "bytes=2000-")


def test_a_range_goes_along_with_a_redirect() -> None:
    """As hubs send files from elsewhere."""
    with Hostile({"/y": Ranged(GOOD, cuts=(2000,))}) as server, Hostile({"/x": redirects(server.url("/y"))}) as hub:
        sink = Memory()
        with Deadline(5) as deadline:
            fetch(Download("k", "x", hub.url("/x"), {"Authorization": "t"}), sink, network(server, hub), deadline, 9999)
        assert (sink.data, server.requests[1].headers["Range"]) == (GOOD, "bytes=2000-")
        assert not server.requests[1].headers["Authorization"]
        assert hub.requests[1].headers["Authorization"] == "t"


# Time (T6).


def test_a_body_that_drips_ends_at_the_deadline_with_no_second_try() -> None:
    with Hostile({"/x": drips(head(200, "Content-Length: 9999") + GOOD, b"w", 0.05)}) as server:
        start = time.monotonic()
        assert refusal(server, Unreachable, seconds=0.5).startswith("The download took longer than 0.5 seconds")
        assert 0.4 < time.monotonic() - start < 3
        assert server.connections == 1


def test_a_download_is_cancelled_from_elsewhere() -> None:
    with (
        Hostile({"/x": drips(head(200, "Content-Length: 9999") + GOOD, b"w", 0.05)}) as server,
        pytest.raises(Cancelled),
    ):
        deadline = Deadline(30)
        threading.Timer(0.2, deadline.cancel).start()
        fetch(Download("k", "x", server.url("/x")), Memory(), network(server), deadline, 9999)
    assert server.connections == 1


def test_a_wait_between_tries_is_cancelled_too() -> None:
    with Hostile({"/x": reply(b"", "Retry-After: 20", status=503)}) as server, pytest.raises(Cancelled):
        deadline = Deadline(30)
        threading.Timer(0.2, deadline.cancel).start()
        fetch(Download("k", "x", server.url("/x")), Memory(), network(server), deadline, 9999)


def test_a_server_that_sends_too_little_for_too_long_is_left() -> None:
    slow = drips(head(200, "Content-Length: 9999") + GOOD, b"w", 0.02)
    patience = Patience(pause=0.01, rate=100_000, window=0.2)
    with Hostile({"/x": in_turn(slow, reply(GOOD))}) as server, Deadline(5) as deadline:
        sink = Memory()
        fetch(Download("k", "x", server.url("/x")), sink, network(server, patience=patience), deadline, 9999)
        assert (sink.data, server.connections) == (GOOD, 2)
    told = pytest.raises(Unreachable, match="sends less than 100000 bytes a second")
    with Hostile({"/x": slow}) as server, Deadline(5) as deadline, told:
        fetch(Download("k", "x", server.url("/x")), sink, network(server, patience=patience), deadline, 9999)


def test_a_server_that_sends_enough_is_waited_for() -> None:
    steady = says(
        head(200, f"Content-Length: {len(GOOD)}"), *(p for n in range(0, 3100, 310) for p in (GOOD[n : n + 310], 0.05))
    )
    with Hostile({"/x": steady}) as server, Deadline(5) as deadline:
        sink, patience = Memory(), Patience(pause=0.01, rate=1000, window=0.2)
        fetch(Download("k", "x", server.url("/x")), sink, network(server, patience=patience), deadline, 9999)
        assert (sink.data, server.connections) == (GOOD, 1)


# What a file is (T7).


@pytest.mark.parametrize(("kind", "body"), KINDS)
def test_what_is_no_lora_is_refused_by_what_it_looks_like(kind: str, body: bytes) -> None:
    """T7: a login page and an error under status 200 among them."""
    sink = Memory()
    with Hostile({"/x": reply(body, "Content-Type: application/octet-stream")}) as server, Deadline(5) as deadline:
        with pytest.raises(SourceError) as error:
            fetch(Download("k", "lora.safetensors", server.url("/x")), sink, network(server), deadline, 1 << 20)
        assert type(error.value) is SourceError
        assert str(error.value).startswith(f"lora.safetensors looks like {kind}")
        assert (sink.data, server.connections) == (b"", 1)


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


# Secrets (X1).


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
