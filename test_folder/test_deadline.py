"""Whatever a server does, waiting for it ends in time and leaves nothing behind (T6)."""

import contextlib
import gc
import socket
import threading

import pytest

from klora.errors import SourceError
from klora.sources.connection import Dialler
from klora.sources.deadline import Allowance, Cancelled, Deadline, Patience
from klora.sources.download import Unreachable
from klora.sources.network import Network
from test_folder.asking import GOOD, body_of, refusal
from test_folder.fakes import network
from test_folder.fakes.hostile import Behaviour, Client, Hostile, drips, hangs, head, resets, says
from test_folder.waiting import soon, timed

SLOW = {
    "nothing": hangs,
    "a status line for ever": drips(b"HTTP/1.1 200 ", b"O", 0.05),
    "headers for ever": drips(head(200)[:-2], b"A: b\r\n", 0.05),
    "interim answers for ever": drips(b"", head(100), 0.05),
    "half a body": says(head(200, "Content-Length: 9") + b"half", 3600.0),
    "a body byte by byte": drips(head(200, "Content-Length: 999"), b"x", 0.05),
    "a body without a length": drips(head(200), b"x", 0.05),
    "chunks for ever": drips(head(200, "Transfer-Encoding: chunked"), b"1\r\nx\r\n", 0.05),
    "a chunk's size for ever": drips(head(200, "Transfer-Encoding: chunked"), b"0", 0.05),
    "trailers for ever": drips(head(200, "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n", b"A: b\r\n", 0.05),
}
every_way_of_being_slow = pytest.mark.parametrize("behaviour", SLOW.values(), ids=SLOW)


@every_way_of_being_slow
def test_whatever_a_server_drips_ends_at_the_deadline(behaviour: Behaviour) -> None:
    """T6, and not at the sum of the reads' timeouts."""
    with Hostile({"/x": behaviour}) as server, timed(0.2):
        said = refusal(network(server), server.url("/x"), Unreachable, 0.3)
        assert said == "The download took longer than 0.3 seconds. Expected a faster source."


@every_way_of_being_slow
def test_whatever_a_server_drips_ends_when_it_is_cancelled(behaviour: Behaviour) -> None:
    with Hostile({"/x": behaviour}) as server, timed(0.15):
        deadline = Deadline(30)
        threading.Timer(0.2, deadline.cancel).start()
        with pytest.raises(Cancelled), network(server).get(server.url("/x"), {}, deadline) as answer:
            answer.read_all(1 << 20)


def test_silence_ends_at_the_timeout_of_a_read() -> None:
    with Hostile({"/x": hangs}) as server, timed(0.1):
        said = refusal(network(server, patience=Patience(read=0.2)), server.url("/x"), Unreachable)
        assert said == "The server does not answer in time. Try again later."


def test_a_connection_that_is_not_taken_ends_at_its_timeout_or_when_cancelled() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(8):  # fills the queue of those who wait to be taken
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"
        net = Network(frozenset({url[7:-1]}), Dialler(Patience(connect=0.3)))
        with timed(0.2):
            assert "does not answer in time" in refusal(net, url, Unreachable)
        with timed(0.1), pytest.raises(Cancelled):
            deadline = Deadline(30)
            threading.Timer(0.2, deadline.cancel).start()
            with Network(net.trusted, Dialler(Patience(connect=20))).get(url, {}, deadline):
                pass


@pytest.mark.parametrize("data", [b"", head(200, "Content-Length: 9") + b"half"])
def test_a_reset_connection_is_told_as_broken(data: bytes) -> None:
    with Hostile({"/x": resets(data)}) as server:
        assert "broke" in refusal(network(server), server.url("/x"), Unreachable)


def test_a_deadline_that_is_over_begins_nothing() -> None:
    with Hostile({"/x": GOOD}) as server, pytest.raises(Unreachable), Deadline(0) as deadline:
        network(server).json(server.url("/x"), {}, deadline)
    assert not server.requests


def test_deadlines_of_one_allowance_have_its_seconds_together() -> None:
    allowance = Allowance(60)
    with allowance.deadline() as deadline:
        deadline.sleep(0.1)
    with allowance.deadline() as deadline:
        assert 30 < deadline.left() <= 59.9
    allowance = Allowance(0.1)
    late = "All downloads of this request took longer than 0.1 seconds. Expected faster sources."
    for _ in range(2):
        with timed(), pytest.raises(Unreachable, match=f"^{late}$"), allowance.deadline() as deadline:
            deadline.sleep(30)


def test_what_begins_to_wait_after_the_end_is_stopped_too() -> None:
    stopped: list[bool] = []
    deadline = Deadline(30)
    deadline.cancel()
    with deadline.interrupting(lambda: stopped.append(True)):
        assert stopped


def test_what_waits_under_a_deadline_ends_with_its_block() -> None:
    ended = threading.Event()

    def wait(deadline: Deadline) -> None:
        with contextlib.suppress(Cancelled):
            deadline.sleep(30)
        ended.set()

    with Deadline(30) as deadline:
        threading.Thread(target=wait, args=(deadline,)).start()
        assert deadline.left() > 29
    assert ended.wait(20)
    with pytest.raises(Cancelled):
        deadline.left()


def test_a_deadline_leaves_no_thread_and_no_socket_behind() -> None:
    with Hostile({"/x": GOOD, "/y": says(head(200, "Content-Length: 9") + b"half")}) as server:
        refusal(network(server), server.url("/y"), Unreachable)
        gc.collect()
        before = {thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)}
        assert body_of(network(server), server.url("/x")) == b"good"
        assert soon(lambda: {t for t in threading.enumerate() if isinstance(t, threading.Timer)} <= before)


def test_a_connection_ends_with_its_block() -> None:
    ended = threading.Event()

    def behave(client: Client) -> None:
        client.send(head(200, "Content-Length: 9") + b"half")
        if not client.sock.recv(1):
            ended.set()

    with Hostile({"/x": behave}) as server, Deadline(20) as deadline:
        with network(server).get(server.url("/x"), {}, deadline) as answer:
            assert not ended.is_set()
        assert ended.wait(20)
        assert answer.status == 200  # and not because nobody holds it any more


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("raw", [head(200, "Content-Length: 9") + b"half", head(200, "Content-Length: -1"), b"SSH\r\n"])
def test_a_connection_is_closed_whatever_came_of_it(raw: bytes) -> None:
    with Hostile({"/x": says(raw)}) as server:
        with contextlib.suppress(SourceError):
            body_of(network(server), server.url("/x"))
        gc.collect()
