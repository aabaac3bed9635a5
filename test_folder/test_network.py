"""Redirects are followed where they may lead, credentials stay, and nobody is told what is secret (T2-T4, X1)."""

import base64
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from klora.errors import SourceError
from klora.sources.authority import Client
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, NotFound, Unreachable
from klora.sources.network import Network
from klora.sources.retries import RETRIES, retry_after_seconds
from test_folder.asking import GOOD, body_of, refusal
from test_folder.fakes import network
from test_folder.fakes.hostile import Behaviour, Hostile, drips, head, in_turn, redirects, reply, resets, says
from test_folder.waiting import timed

# Redirects (T3) and what goes along with them (T4).


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/y?a=b", "y?a=b", "{url}/y?a=b", "//{host}/y?a=b", "./z/../y?a=b"])
def test_a_redirect_is_followed(status: int, location: str) -> None:
    with Hostile({"/y": GOOD}) as server:
        where = location.format(url=server.url(""), host=server.host)
        server.routes = {"/x": redirects(where, status), "/y": GOOD}
        with Deadline(20) as deadline, network(server).get(server.url("/x"), {}, deadline) as answer:
            assert (answer.url, answer.redirected) == (server.url("/y?a=b"), True)
            assert answer.read_all(9) == b"good"


def test_five_hops_are_followed_and_six_are_not() -> None:
    routes = {f"/{n}": redirects(f"/{n - 1}") for n in range(1, 7)}
    with Hostile({**routes, "/0": GOOD}) as server:
        assert body_of(network(server), server.url("/5")) == b"good"
        assert "redirected more than 5 times" in refusal(network(server), server.url("/6"))


def test_a_loop_ends() -> None:
    with Hostile({"/x": redirects("/x")}) as server:
        assert "redirected more than 5 times" in refusal(network(server), server.url("/x"))
        assert server.connections == 6


@pytest.mark.parametrize(
    "location",
    [
        *(
            "file:///etc/passwd",
            "ftp://example.org/",
            "http://169.254.169.254/latest/",
            "http://[::1]/",
            "http://127.0.0.1/",
        ),
        *(
            "https://127.0.0.1:8443/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://169.254.169.254/",
            "https://10.0.0.1/",
        ),
        *(
            "https://2130706433/",
            "https://u:p@example.org/",
            "javascript:1",
            "data:,x",
            "//127.0.0.1:1/",
            "https://[::1",
        ),
    ],
)
def test_a_redirect_to_where_nobody_may_go_is_refused(location: str) -> None:
    """T3: schemes, ports and private addresses at every hop."""
    with Hostile({"/x": redirects(location)}) as server:
        said = refusal(network(server), server.url("/x"))
        assert "127.0.0.1" not in said
        assert "169.254" not in said
        assert server.connections == 1


def test_a_redirect_can_be_looked_at() -> None:
    with Hostile({"/x": redirects("/login")}) as server, Deadline(20) as deadline:
        with network(server).get(server.url("/x"), {}, deadline, follow=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (302, "/login")
        assert server.connections == 1


@pytest.mark.parametrize("status", [200, 201, 304, 404])
def test_what_is_no_redirect_is_the_answer_wherever_it_points(status: int) -> None:
    with Hostile({"/x": reply(b"", "Location: /y", status=status), "/y": GOOD}) as server, Deadline(20) as deadline:
        with network(server).get(server.url("/x"), {}, deadline) as answer:
            assert (answer.status, answer.redirected) == (status, False)
        assert server.connections == 1


SECRET = {"Authorization": "Bearer canary", "Cookie": "a=canary", "X-Api-Key": "canary"}
PLAIN = {"Range": "bytes=1-", "If-Range": '"1"', "Accept": "application/json", "Content-Type": "application/json"}


def test_credentials_stay_with_their_origin_and_never_come_back() -> None:
    """T4: another port is another origin; what asks for a part or a form is no credential and goes along."""
    with Hostile() as first, Hostile() as second:
        first.routes = {"/x": redirects("/y"), "/y": redirects(second.url("/z")), "/end": GOOD}
        second.routes = {"/z": redirects(first.url("/end"))}
        assert body_of(network(first, second), first.url("/x"), {**SECRET, **PLAIN}) == b"good"
        own, foreign, back = (server.asked(path)[0].headers for server, path in
                              ((first, "/y"), (second, "/z"), (first, "/end")))  # fmt: skip
        assert all(own[name] == value for name, value in SECRET.items())
        for headers in (foreign, back):
            assert {name: headers[name] for name in PLAIN} == PLAIN
            assert "canary" not in str(headers)


def test_cookies_are_not_kept() -> None:
    with Hostile({"/x": reply(b"", "Set-Cookie: a=b", "Location: /y", status=302), "/y": GOOD}) as server:
        net = network(server)
        body_of(net, server.url("/x"))
        body_of(net, server.url("/y"))
        assert not [client for client in server.requests if client.headers["Cookie"]]


def test_the_environment_sends_nobody_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no login of the machine's own."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login operator password canary\n")
    with Hostile({"/x": GOOD}) as server, Hostile() as proxy:
        monkeypatch.setenv("NETRC", str(netrc))
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        assert body_of(network(server), server.url("/x")) == b"good"
        assert not proxy.connections
        assert not server.requests[0].headers["Authorization"]


# JSON of an authority (T2).


def json_of(net: Network, url: str, headers: Mapping[str, str] | None = None, **more: Any) -> Any:
    with Deadline(20) as deadline:
        return net.json(url, headers or {}, deadline, **more)


def test_json_is_asked_for_and_read() -> None:
    with Hostile({"/x": reply(b'{"a": [1]}')}) as server:
        assert json_of(network(server), server.url("/x"), {"Authorization": "Bearer t"}) == {"a": [1]}
        assert server.requests[0].headers["Accept"] == "application/json"
        assert server.requests[0].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, NotFound),
        (410, NotFound),
        (401, Denied),
        (403, Denied),
        (400, SourceError),
        (302, SourceError),
        (204, SourceError),
    ],
)
def test_a_status_becomes_its_error_at_once(status: int, kind: type[SourceError]) -> None:
    """T2."""
    packed = reply(b'{"error": "canary"}', "Content-Encoding: gzip", status=status)  # nobody reads it
    with Hostile({"/x": packed}) as server:
        with pytest.raises(kind) as error:
            json_of(network(server), server.url("/x"))
        assert type(error.value) is kind
        assert f"The server answers {status}" in str(error.value)
        assert "canary" not in str(error.value)
        assert server.connections == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again(status: int) -> None:
    """T2: 500 twice, then 200; and for ever."""
    bad = reply(b"", status=status)
    with Hostile({"/x": in_turn(bad, bad, reply(b"1")), "/y": bad}) as server:
        assert json_of(network(server), server.url("/x")) == 1
        with pytest.raises(Unreachable, match=f"answers {status}"):
            json_of(network(server), server.url("/y"))
        assert (len(server.asked("/x")), len(server.asked("/y"))) == (3, 1 + RETRIES)


@pytest.mark.parametrize(
    ("ask", "good", "answer"),
    [
        (Client.json, reply(b"1"), 1),
        (Client.check_access, GOOD, None),
        (Client.redirection, GOOD, None),
        (Client.redirection, redirects("/y"), "/y"),
    ],
    ids=["json", "access", "no_redirection", "redirection"],
)
def test_whatever_an_authority_is_asked_is_asked_again_with_the_token(
    ask: Callable[[Client, str], Any], good: Behaviour, answer: Any
) -> None:
    bad, headers = reply(b"", status=503), {"Authorization": "Bearer t"}
    with Hostile({"/x": in_turn(bad, bad, good)}) as server, Deadline(20) as deadline:
        url = server.url("/x")
        expected = server.url(answer) if answer == "/y" else answer
        assert ask(Client(server.url(""), headers, network(server), deadline), url) == expected
        assert [request.headers["Authorization"] for request in server.asked("/x")] == ["Bearer t"] * 3
        assert not server.asked("/y")


def test_a_server_is_given_the_time_that_it_asks_for() -> None:
    """T2: 429 with Retry-After, then 200."""
    with Hostile({"/x": in_turn(reply(b"", "Retry-After: 1", status=429), reply(b"1"))}) as server, timed(1):
        assert json_of(network(server), server.url("/x")) == 1


@pytest.mark.parametrize("asked", ["3600", "Wed, 01 Jan 2188 00:00:00 GMT"])
def test_a_server_that_asks_for_more_time_than_there_is_gets_none(asked: str) -> None:
    with Hostile({"/x": reply(b"", f"Retry-After: {asked}", status=503)}) as server, timed():
        with pytest.raises(Unreachable, match="answers 503"):
            json_of(network(server), server.url("/x"))
        assert server.connections == 1


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1e9", "Fri, 01 Jan 1999 00:00:00 GMT", "9" * 400])
def test_a_retry_after_that_makes_no_sense_is_none(text: str | None) -> None:
    assert retry_after_seconds(text) == 0


@pytest.mark.parametrize("body", [b"<html>canary", b"", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused_without_being_quoted(body: bytes) -> None:
    with Hostile({"/x": reply(body)}) as server:
        with pytest.raises(SourceError, match="something else than JSON") as error:
            json_of(network(server), server.url("/x"))
        assert error.value.__context__ is None


def test_json_is_bounded() -> None:
    long = reply(b'"' + b"x" * 5000 + b'"')
    with Hostile({"/x": long}) as server, pytest.raises(SourceError, match="more than 4096 bytes"):
        json_of(network(server), server.url("/x"), max_bytes=4096)


# Secrets (X1).

TOKEN, QUERY = "canary+token/1=", "canary-signed-query"
SPELLED = {
    spelling
    for secret in (TOKEN, QUERY)
    for spelling in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("="))
} | {"canary", "127.0.0.1"}

LEAKS: dict[str, Callable[[Hostile], Behaviour]] = {
    "404": lambda _: reply(b"canary", status=404),
    "403": lambda _: reply(b"canary", status=403),
    "503": lambda _: reply(b"canary", "Retry-After: canary", status=503),
    "redirect inside": lambda _: redirects(f"https://10.0.0.1/{QUERY}?sig={QUERY}"),
    "redirect to a port": lambda _: redirects(f"https://example.org:1/{QUERY}?sig={QUERY}"),
    "redirect to http": lambda _: redirects(f"http://example.org/{QUERY}?sig={QUERY}"),
    "redirect to a name of ours": lambda _: redirects(f"https://user:{QUERY}@example.org/"),
    "redirects": lambda server: redirects(server.url(f"/x?sig={QUERY}")),
    "bad headers": lambda _: says(f"HTTP/1.1 200 OK\r\n{QUERY}\r\n x\r\nLocation: /{QUERY}\r\n\r\n".encode()),
    "no http": lambda _: says(f"{QUERY} {TOKEN}\r\n\r\n".encode()),
    "lengths": lambda _: reply(b"", f"Content-Length: {QUERY}"),
    "encoding": lambda _: reply(b"", f"Content-Encoding: {QUERY}"),
    "short": lambda _: says(head(200, "Content-Length: 99") + QUERY.encode()),
    "reset": lambda _: resets(head(200, "Content-Length: 99") + QUERY.encode()),
    "drip": lambda _: drips(head(200)[:-2], f"A: {QUERY}\r\n".encode(), 0.05),
    "no json": lambda _: reply(f"{QUERY} {TOKEN}".encode()),
}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, also what is not shown."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def told(error: BaseException) -> str:
    return "\n".join(f"{link!r} {link}" for link in chain(error)) + "".join(traceback.format_exception(error))


@pytest.mark.parametrize("behaviour", LEAKS.values(), ids=LEAKS)
def test_no_secret_is_told_logged_or_printed(
    behaviour: Callable[[Hostile], Behaviour], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """X1: a token in the headers and a signed query, over everything that goes wrong, at DEBUG."""
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Basic": base64.b64encode(TOKEN.encode()).decode()}
    with Hostile() as server:
        server.routes = {"/x": behaviour(server)}
        with pytest.raises(SourceError) as error, Deadline(0.6) as deadline:
            network(server).json(server.url(f"/x?sig={QUERY}"), headers, deadline)
    printed = capfd.readouterr()
    everything = "\n".join((told(error.value), caplog.text, printed.out, printed.err))
    assert not [spelling for spelling in SPELLED if spelling in everything]
    assert str(error.value)


@pytest.mark.parametrize("token", ["canary\r\nX: y", "canary\n", "canaryé", "canary\0", "canary\x7f"])
def test_a_token_that_no_header_can_hold_is_refused_without_being_quoted(token: str) -> None:
    with Hostile({"/x": GOOD}) as server:
        with pytest.raises(SourceError, match=r"^Authorization .* Expected a token in ASCII\.$") as error:
            body_of(network(server), server.url("/x"), {"Authorization": f"Bearer {token}"})
        assert "canary" not in told(error.value)
        assert not server.connections
