"""A file has the length and the hash that were named, and no more than may be (T5)."""

import pytest

from klora.errors import SourceError
from klora.sources.deadline import Deadline
from klora.sources.download import Download, Unreachable
from klora.sources.fetch import fetch
from klora.sources.retries import RETRIES
from test_folder.fakes import Memory, network
from test_folder.fakes.hostile import Behaviour, Hostile, floods, head, reply, says
from test_folder.fetching.fetched import fetched, refusal
from test_folder.test_formats import GOOD


@pytest.mark.parametrize("length", [2000, 10**12])
def test_a_declared_length_above_the_cap_is_refused_before_anything_is_written(length: int) -> None:
    sink = Memory()
    with Hostile({"/x": says(head(200, f"Content-Length: {length}") + GOOD)}) as server:
        with (
            pytest.raises(SourceError, match=f"is {length} bytes long. Expected at most 1999"),
            Deadline(20) as deadline,
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
    with Hostile({"/x": behaviour}) as server, Deadline(20) as deadline, told:
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
