"""A download ends at its deadline, when it is cancelled, and when too little comes for too long (T6)."""

import threading
from contextlib import nullcontext

import pytest

from klora.sources.deadline import Cancelled, Deadline, Patience
from klora.sources.download import Download, Unreachable
from klora.sources.fetch import _Pace, fetch
from test_folder.fakes import Memory, network
from test_folder.fakes.hostile import Hostile, drips, head, in_turn, reply, says
from test_folder.fetching.fetched import refusal
from test_folder.test_formats import GOOD
from test_folder.waiting import timed


def test_a_body_that_drips_ends_at_the_deadline_with_no_second_try() -> None:
    with Hostile({"/x": drips(head(200, "Content-Length: 9999") + GOOD, b"w", 0.05)}) as server:
        with timed(0.4):
            assert refusal(server, Unreachable, seconds=0.5).startswith("The download took longer than 0.5 seconds")
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


@pytest.mark.parametrize("sent", [GOOD[:100], GOOD], ids=["from the first on", "after it sent enough"])
def test_a_server_that_sends_too_little_for_too_long_is_left(sent: bytes) -> None:
    slow = drips(head(200, "Content-Length: 9999") + sent, b"w", 0.02)
    with Hostile({"/x": in_turn(slow, reply(GOOD)), "/y": slow}) as server, Deadline(20) as deadline:
        sink, net = Memory(), network(server, patience=Patience(pause=0.01, rate=1000, window=0.1))
        fetch(Download("k", "x", server.url("/x")), sink, net, deadline, 9999)
        assert (sink.data, server.connections) == (GOOD, 2)
        with pytest.raises(Unreachable, match="sends less than 1000 bytes a second"):
            fetch(Download("k", "x", server.url("/y")), sink, net, deadline, 9999)


@pytest.mark.parametrize(("count", "enough"), [(9_000, False), (11_000, True)])
def test_as_much_must_come_as_the_time_is_long(count: int, enough: bool) -> None:
    pace = _Pace(Patience(rate=1_000, window=5), "x")
    pace.start -= 10
    with nullcontext() if enough else pytest.raises(Unreachable, match="less than 1000 bytes a second"):
        pace.add(count)


def test_a_server_that_sends_enough_is_waited_for() -> None:
    steady = says(
        head(200, f"Content-Length: {len(GOOD)}"), *(p for n in range(0, 3100, 310) for p in (GOOD[n : n + 310], 0.05))
    )
    with Hostile({"/x": steady}) as server, Deadline(20) as deadline:
        sink, patience = Memory(), Patience(pause=0.01, rate=100, window=0.2)
        fetch(Download("k", "x", server.url("/x")), sink, network(server, patience=patience), deadline, 9999)
        assert (sink.data, server.connections) == (GOOD, 1)
