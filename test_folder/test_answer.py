"""A body is read to its end or not taken for whole, whatever its headers say (T5, T6, T7)."""

import pytest

from klora.errors import SourceError
from klora.sources.deadline import Deadline
from klora.sources.download import Unreachable
from test_folder.asking import GOOD, body_of, refusal
from test_folder.fakes import network
from test_folder.fakes.hostile import Hostile, floods, head, says
from test_folder.waiting import timed


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (head(200, "Content-Length: 4") + b"good and more", b"good"),
        (head(200, "Content-Length: 0") + b"more", b""),
        (head(200) + b"good", b"good"),
        (head(200, "Transfer-Encoding: chunked") + b"2\r\ngo\r\n2;x=y\r\nod\r\n0\r\nTrailer: x\r\n\r\n", b"good"),
        (head(200, "Content-Length: 4", "Content-Encoding: identity") + b"good", b"good"),
        (head(200, "Content-Length: 4", 'Content-Disposition: attachment; filename="../../x"') + b"good", b"good"),
        (head(100) + head(200, "Content-Length: 4") + b"good", b"good"),
    ],
)
def test_a_body_is_read_to_its_end_and_no_further(raw: bytes, body: bytes) -> None:
    with Hostile({"/x": says(raw)}) as server:
        assert body_of(network(server), server.url("/x")) == body


@pytest.mark.parametrize(
    "raw",
    [
        head(200, "Content-Length: 9") + b"short",
        head(200, "Content-Length: 9"),
        head(200, "Transfer-Encoding: chunked") + b"5\r\nshort\r\n",
        head(200, "Transfer-Encoding: chunked") + b"9\r\nshort",
        head(200, "Transfer-Encoding: chunked") + b"what\r\n",
        head(200)[:-6],
        b"",
    ],
)
def test_a_body_that_breaks_off_is_not_taken_for_whole(raw: bytes) -> None:
    with Hostile({"/x": says(raw)}) as server:
        refusal(network(server), server.url("/x"), Unreachable)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: -1",),
        ("Content-Length: 4", "Content-Length: 5"),
        ("Content-Length: 4", "Content-Length: 4"),
        ("Content-Length: 4, 4",),
        ("Content-Length: 0x4",),
        ("Content-Length: " + "9" * 5000,),
        ("Content-Length: 4", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Content-Encoding: gzip", "Content-Length: 4"),
        ("Content-Encoding: br", "Content-Length: 4"),
        ("Content-Encoding: identity, gzip", "Content-Length: 4"),
        ("X: " + "x" * (1 << 20),),
        tuple(f"X-{n}: x" for n in range(100_000)),
        tuple("X: " + "x" * 30_000 for _ in range(3)),
    ],
    ids=lambda headers: headers[0][:40],
)
def test_headers_that_are_ambiguous_encoded_or_too_long_are_refused(headers: tuple[str, ...]) -> None:
    """T5, T6: 1 MB in one header and 100 000 of them; T7: a body that would have to be unpacked."""
    with Hostile({"/x": says(head(200, *headers) + b"good")}) as server, timed():
        assert refusal(network(server), server.url("/x")).startswith("The server ")


@pytest.mark.parametrize("raw", [b"SSH-2.0\r\n", b"<html>\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 x y\r\n\r\n"])
def test_what_is_no_http_is_refused(raw: bytes) -> None:
    with Hostile({"/x": says(raw)}) as server:
        assert "does not answer as a web server does" in refusal(network(server), server.url("/x"))


def test_interim_answers_without_end_are_refused() -> None:
    with Hostile({"/x": floods(b"", head(100))}) as server, timed():
        assert "Expected HTTP with short headers" in refusal(network(server), server.url("/x"))


def test_a_body_in_memory_is_bounded() -> None:
    with Hostile({"/x": floods(head(200), b"x" * 65536)}) as server, timed():
        assert "more than 1048576 bytes" in refusal(network(server), server.url("/x"))


def test_a_body_in_memory_may_have_all_of_its_bound() -> None:
    with Hostile({"/x": GOOD}) as server, Deadline(20) as deadline:
        with network(server).get(server.url("/x"), {}, deadline) as answer:
            assert answer.read_all(4) == b"good"
        with (
            network(server).get(server.url("/x"), {}, deadline) as answer,
            pytest.raises(SourceError, match="than 3 b"),
        ):
            answer.read_all(3)


def test_nothing_is_asked_in_an_encoding_nor_by_a_nameless_client() -> None:
    with Hostile({"/x": GOOD}) as server:
        body_of(network(server), server.url("/x"), {"Accept": "*/*", "accept-encoding": "gzip", "host": "x.org"})
        asked = server.requests[0].headers
        assert {name: asked.get_all(name) for name in ("Host", "Accept-Encoding", "User-Agent", "Accept")} == {
            "Host": [server.host], "Accept-Encoding": ["identity"], "User-Agent": ["klora"], "Accept": ["*/*"],
        }  # fmt: skip


def test_an_answer_says_what_came() -> None:
    with Hostile({"/x": GOOD}) as server, Deadline(20) as deadline:
        url = server.url("/x?y")
        with network(server).get(url, {}, deadline) as answer:
            seen = answer.status, answer.length, answer.who, answer.url, answer.redirected
        assert seen == (200, 4, "The server", url, False)
