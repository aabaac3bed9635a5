"""A broken download is taken up where it broke, if it is surely the same file (T6, T8)."""

import pytest

from klora.sources.deadline import Deadline
from klora.sources.download import Download
from klora.sources.fetch import fetch
from test_folder.fakes import Memory, network
from test_folder.fakes.hostile import Hostile, Ranged, head, in_turn, redirects, reply, resets, says
from test_folder.fetching.fetched import SHA256, fetched, refusal
from test_folder.test_formats import GOOD, safetensors


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


def test_a_part_that_repeats_no_etag_is_of_the_file_that_was_asked_for() -> None:
    """T8: If-Range has named it."""
    said = f"bytes 2000-{len(GOOD) - 1}/{len(GOOD)}"
    rest = says(head(206, f"Content-Length: {len(GOOD) - 2000}", f"Content-Range: {said}") + GOOD[2000:])
    with Hostile({"/x": in_turn(Ranged(GOOD, cuts=(2000,)), rest)}) as server:
        sink = fetched(server)
        assert (sink.data, sink.restarts) == (GOOD, 0)


def test_a_part_tells_how_long_the_whole_is_where_the_beginning_did_not() -> None:
    cut, said = resets(head(200, 'ETag: "1"') + GOOD[:600]), f"Content-Range: bytes 600-{len(GOOD) - 1}/{len(GOOD)}"
    short = says(head(206, said, 'ETag: "1"') + GOOD[600:2000])
    with Hostile({"/x": in_turn(cut, short, Ranged(GOOD))}) as server:
        assert fetched(server).data == GOOD


def test_the_rest_of_a_file_above_the_cap_is_cut_there() -> None:
    """T5: where only the part tells how long the whole is."""
    cut, said = resets(head(200, 'ETag: "1"') + GOOD[:600]), f"Content-Range: bytes 600-{len(GOOD) - 1}/{len(GOOD)}"
    with Hostile({"/x": in_turn(cut, says(head(206, said, 'ETag: "1"') + GOOD[600:]))}) as server:
        assert f"does not end after {len(GOOD) - 1} bytes" in refusal(server, most=len(GOOD) - 1)


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
        with Deadline(20) as deadline:
            fetch(Download("k", "x", hub.url("/x"), {"Authorization": "t"}), sink, network(server, hub), deadline, 9999)
        assert (sink.data, server.requests[1].headers["Range"]) == (GOOD, "bytes=2000-")
        assert not server.requests[1].headers["Authorization"]
        assert hub.requests[1].headers["Authorization"] == "t"
