"""What comes is the file that was sent, or is told by its status (T1, T2)."""

import pytest

from klora.errors import SourceError
from klora.sources.download import Denied, NotFound, Unreachable
from klora.sources.retries import RETRIES
from test_folder.fakes.hostile import Behaviour, Hostile, head, in_turn, reply, says
from test_folder.fetching.fetched import SHA256, fetched, refusal
from test_folder.test_formats import GOOD
from test_folder.waiting import timed


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
    busy, busier = (reply(b"", f"Retry-After: {seconds}", status=429) for seconds in (1, 30))
    with Hostile({"/x": in_turn(busy, reply(GOOD)), "/y": busier}) as server:
        with timed(1):
            assert fetched(server).data == GOOD
        with timed():
            refusal(server, Unreachable, "/y")
