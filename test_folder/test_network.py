"""Connections go only where they may, end in time, and tell nobody what is secret (T2-T7, T9, T10 and X1)."""

import base64
import contextlib
import gc
import logging
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from klora.errors import SourceError
from klora.sources.addresses import is_public, parse_url
from klora.sources.connection import Dialler
from klora.sources.deadline import Cancelled, Deadline, Patience
from klora.sources.download import Denied, NotFound, Unreachable
from klora.sources.network import Network
from klora.sources.retries import RETRIES, seconds_asked
from test_folder.fakes.hostile import (
    Behaviour,
    Client,
    Hostile,
    drips,
    floods,
    hangs,
    head,
    in_turn,
    redirects,
    reply,
    resets,
    says,
    wait_until,
)

QUICK = Patience(connect=5.0, read=5.0, pause=0.01)
AUTHORITIES = ssl.create_default_context()  # one for all, since reading them takes longer than most tests
PUBLIC = "93.184.215.14"
GOOD = reply(b"good")


def info(address: str, port: int = 443) -> tuple[int, int, int, str, tuple[Any, ...]]:
    """An answer of a resolver."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.SOCK_STREAM, 0, "", (address, port, 0, 0) if ":" in address else (address, port)


def network(*servers: Hostile, **dialler: Any) -> Network:
    usual = {"patience": QUICK, "context": AUTHORITIES}
    return Network(frozenset(server.authority for server in servers), Dialler(**{**usual, **dialler}))


def body_of(net: Network, url: str, headers: Mapping[str, str] | None = None, **more: Any) -> bytes:
    with Deadline(5) as deadline, net.get(url, headers or {}, deadline, **more) as answer:
        return answer.read_all(1 << 20)


def refusal(net: Network, url: str, kind: type[SourceError] = SourceError, seconds: float = 5.0) -> str:
    with pytest.raises(kind) as error, Deadline(seconds) as deadline, net.get(url, {}, deadline) as answer:
        answer.read_all(1 << 20)
    assert type(error.value) is kind or kind is not SourceError
    return str(error.value)


# Addresses and their spellings (T10).

PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.1.2.3 169.254.169.254
169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.8 192.0.0.170 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1
198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::8.8.8.8 64:ff9b:1::a00:1
100::1 2001::1 2001:0:7f00:1:: 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe::1 3fff::1
5f00::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fe80::1%lo fec0::1 ff02::1 ff0e::1 2620:4f:8000::1 4000::1
2606:4700::1111%lo /tmp/socket 127.1 huggingface.co
"""
GLOBAL = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 192.167.0.1
198.17.255.255 198.20.0.1 223.255.255.255 168.63.129.17 2606:4700::1111 2001:4860:4860::8888 2a00::1 2620:4e::1
"""
SPELLINGS = """
https://2130706433/ https://0x7f000001/ https://017700000001/ https://127.1/ https://127.0.1/ https://0177.0.0.1/
https://0x7f.0.0.1/ https://0x7f.1/ https://127.0.0.0x1/ https://127.0.0.01/ https://00000177.0.0.1/ https://256.1.1.1/
https://0/ https://0x/ https://1.1.1.1.1/ https://127.0.0.1../ https://.127.0.0.1/ https://[::1/ https://::1/
https://[::1%25lo]/ https://[fe80::1%25eth0]/ https://[127.0.0.1]/ https://[::ffff:0x7f.1]/ https://[v1.x]/
https://１２７.0.0.1/ https://①②⑦.⓪.⓪.①/ https://127。0。0。1/ https://loc\u00adalhost/ https://bücher.example/
https://127.0.0.1%2f.example/ https://127.0.0.1%00.example/ https://ex%61mple.org/ https://-a.example/
https://a..example/
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_an_address_that_is_not_of_the_public_internet_is_told(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", GLOBAL.split())
def test_an_address_of_the_public_internet_is_told(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("url", SPELLINGS.split())
def test_a_host_in_any_but_its_plain_spelling_is_refused(url: str) -> None:
    """T10, before any resolver is asked: inet_aton reads most of these."""
    with pytest.raises(SourceError, match=r"^The link (names no host|is no web address that can be read)\. Expected "):
        parse_url(url)


NOWHERE = """
http://x.org/a ftp://x.org/a file:///etc/passwd gopher://x.org/ //x.org/a x.org/a data:,x https:// https:///a
https://x.org:8443/a https://x.org:80/ https://x.org:0/ https://x.org:99999/ https://x.org:x/ https://x.org:-443/
https://u@x.org/ https://u:p@x.org/ https://x.org:443@127.0.0.1/ https://@x.org/ https:\\\\x.org\\a
https://x.org\\@10.0.0.1/
"""
CONTROLS = [
    "https://x\t.org/",
    " https://x.org/",
    "https://x.org/a\r\nHost: y",
    "https://x.org/\0",
    "https://x.org/a b",
    "",
]


@pytest.mark.parametrize("url", [*NOWHERE.split(), *CONTROLS])
def test_a_url_that_may_not_be_followed_is_refused(url: str) -> None:
    """T3, T10: schemes, ports, user names, backslashes and control characters."""
    with pytest.raises(SourceError, match=r"^The link .*\. Expected "):
        parse_url(url)


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("HTTPS://Example.ORG", "example.org", "/"),
        ("https://example.org.:443/a/../b?q=%20#part", "example.org", "/a/../b?q=%20"),
        ("https://example.org/é?é=%2F", "example.org", "/%C3%A9?%C3%A9=%2F"),
        ("https://[2606:4700::0:1111]/x", "[2606:4700::1111]", "/x"),
        ("https://a_b.xn--bcher-kva.example/x", "a_b.xn--bcher-kva.example", "/x"),
        ("https://1.1.1.1/x", "1.1.1.1", "/x"),
    ],
)
def test_a_public_url_leads_where_it_says(url: str, authority: str, path: str) -> None:
    target = parse_url(url)
    assert (target.scheme, target.authority, target.port, target.path) == ("https", authority, 443, path)


@pytest.mark.parametrize("url", ["http://10.0.0.1:8080/", "https://10.0.0.1:8080/", "http://[::1]:8080/"])
def test_what_the_operator_trusts_may_be_http_and_private_on_that_port_alone(url: str) -> None:
    trusted = {"10.0.0.1:8080", "[::1]:8080"}
    assert parse_url(url, trusted).trusted
    for other in (url.replace("8080", "8081"), url.replace(":8080", "") if "http:" in url else "http://10.0.0.2:8080/"):
        with pytest.raises(SourceError):
            parse_url(other, trusted)


# What a resolver says (T9).


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%lo"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_name_with_any_private_address_is_refused_and_not_dialled(address: str, order: int) -> None:
    dialled: list[Any] = []
    answers = [info(PUBLIC), info(address)][::order]
    net = Network(dialler=Dialler(QUICK, lambda *_, **__: answers, lambda _, address: dialled.append(address)))
    said = refusal(net, "https://rebound.example/x")
    assert said == "rebound.example has no public address. Expected a host on the public internet."
    assert not dialled


def test_the_address_that_was_checked_is_the_one_that_is_dialled() -> None:
    """T9: a name that is public once and private the next time is asked for once."""
    dialled: list[Any] = []
    answers = iter([[info(PUBLIC)], [info("127.0.0.1")]])

    def connect(_: socket.socket, address: Any) -> None:
        dialled.append(address)
        raise ConnectionRefusedError

    net = Network(dialler=Dialler(QUICK, lambda *_, **__: next(answers), connect))
    refusal(net, "https://rebound.example/x", Unreachable)
    assert dialled == [(PUBLIC, 443)]
    assert refusal(net, "https://rebound.example/x").startswith("rebound.example has no public address.")


def test_a_name_that_turns_private_between_hops_is_refused() -> None:
    """T9: every hop resolves and checks anew."""
    answers = {"moving.example": iter([[info(PUBLIC)], [info("10.0.0.1")]])}
    with Hostile({"/x": redirects("https://moving.example/y"), "/y": GOOD}) as server:
        ours = info("127.0.0.1", server.port)
        net = network(
            server,
            patience=Patience(connect=0.2),  # the encryption that a plain server never answers
            resolve=lambda host, *_, **__: next(answers[host]) if host in answers else [ours],
            connect=lambda sock, address: sock.connect(ours[4]),
        )
        with contextlib.suppress(SourceError):  # the first time it is public: there is no certificate, though
            body_of(net, server.url("/x"))
        assert "no public address" in refusal(net, server.url("/x"))


def test_a_name_that_is_not_there_is_told_in_the_words_of_one_that_is_inside() -> None:
    def resolve(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    said = refusal(Network(dialler=Dialler(QUICK, resolve)), "https://no.example/x", Unreachable)
    assert said == "no.example has no public address. Expected a host on the public internet."


def test_the_second_address_is_tried_where_the_first_takes_no_connection() -> None:
    with Hostile({"/x": GOOD}) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        answers = [info("127.0.0.1", closed.getsockname()[1]), info("127.0.0.1", server.port)]
        closed.close()
        assert body_of(network(server, resolve=lambda *_, **__: answers), server.url("/x")) == b"good"


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_resolver_that_hangs_holds_nobody_up(cancelled: bool) -> None:
    answer = threading.Event()
    net = Network(dialler=Dialler(Patience(connect=9), lambda *_, **__: answer.wait(10) and []))
    deadline = Deadline(30 if cancelled else 0.3)
    if cancelled:
        threading.Timer(0.3, deadline.cancel).start()
    with timed(0.2, 3), pytest.raises(SourceError) as error, net.get("https://slow.example/", {}, deadline):
        pass
    answer.set()
    assert type(error.value) is (Cancelled if cancelled else Unreachable)


# Encryption.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for files.example that it signs itself, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    name = ["-subj", "/CN=files.example", "-addext", "subjectAltName=DNS:files.example"]
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(["openssl", "req", "-x509", *made, *name], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


def encrypted(certificate: Path, routes: dict[str, Behaviour], names: list[str | None] | None = None) -> Hostile:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    if names is not None:
        context.sni_callback = lambda sock, name, context: names.append(name)
    return Hostile(routes, tls=context)


def believing(certificate: Path, port: int, asked: list[Any] | None = None) -> Dialler:
    """Names are public, connections come to the server all the same, and the certificate is an authority's."""

    def connect(sock: socket.socket, address: Any) -> None:
        if asked is not None:
            asked.append(address)
        sock.connect(("127.0.0.1", port))

    context = ssl.create_default_context(cafile=str(certificate))
    return Dialler(QUICK, lambda *_, **__: [info(PUBLIC)], connect, context)


def test_a_name_is_dialled_by_its_address_and_kept_as_host_and_in_the_handshake(certificate: Path) -> None:
    names, asked = [], []
    with encrypted(certificate, {"/x": GOOD}, names) as server:
        net = Network(dialler=believing(certificate, server.port, asked))
        assert body_of(net, "https://files.example/x") == b"good"
        assert (names, asked) == (["files.example"], [(PUBLIC, 443)])
        assert server.requests[0].headers.get_all("Host") == ["files.example"]


def test_a_certificate_for_another_name_is_refused_before_anything_is_asked(certificate: Path) -> None:
    with encrypted(certificate, {"/x": GOOD}) as server:
        net = Network(dialler=believing(certificate, server.port))
        said = refusal(net, "https://other.example/x")
        assert said.startswith("other.example has no valid certificate for its name.")
        assert not server.requests


def test_a_certificate_that_no_authority_signed_is_refused(certificate: Path) -> None:
    with encrypted(certificate, {"/x": GOOD}) as server:
        dialler = believing(certificate, server.port)
        net = Network(dialler=Dialler(QUICK, dialler.resolve, dialler.connect))
        assert "certificate" in refusal(net, "https://files.example/x")
        assert not server.requests


def test_an_encrypted_body_that_ends_without_a_farewell_is_broken(certificate: Path) -> None:
    """Whoever sits in between could end it so."""

    def behave(client: Client) -> None:
        client.send(head(200) + b"half")
        client.pause(0.05)
        socket.socket.shutdown(client.sock, socket.SHUT_RDWR)

    with encrypted(certificate, {"/x": behave}) as server:
        assert "broke" in refusal(
            Network(dialler=believing(certificate, server.port)), "https://files.example/x", Unreachable
        )


@pytest.mark.parametrize("part", ["handshake", "headers", "body"])
@pytest.mark.parametrize(("seconds", "kind"), [(0.4, Unreachable), (30.0, Cancelled)], ids=["deadline", "cancelled"])
def test_an_encrypted_connection_ends_with_its_deadline_too(
    certificate: Path, part: str, seconds: float, kind: type[SourceError]
) -> None:
    slow = {"headers": drips(head(200)[:-2], b"A: b\r\n", 0.05), "body": drips(head(200), b"x", 0.05)}.get(part, hangs)
    with encrypted(certificate, {"/x": slow}) as server, socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1] if part == "handshake" else server.port
        net = Network(dialler=believing(certificate, port))
        deadline = Deadline(seconds)
        if kind is Cancelled:
            threading.Timer(0.4, deadline.cancel).start()
        with timed(0.3, 3), pytest.raises(kind), net.get("https://files.example/x", {}, deadline) as answer:
            answer.read_all(1 << 20)


def test_an_encrypted_socket_that_is_shut_stays_encrypted(certificate: Path) -> None:
    """Or a read under way might take what is left of the ciphertext for the body."""
    with encrypted(certificate, {}) as server, socket.create_connection(("127.0.0.1", server.port)) as plain:
        context = ssl.create_default_context(cafile=str(certificate))
        deadline = Deadline(5)
        with context.wrap_socket(plain, server_hostname="files.example") as sock, deadline.watch(sock):
            deadline.cancel()
            assert sock.version()
            with pytest.raises(OSError, match=r"Broken pipe|EOF|closed"):
                sock.sendall(b"x")


def test_encryption_is_not_left_on_the_way(certificate: Path) -> None:
    """T3: https to http, even to a host that is trusted."""
    with Hostile({"/y": GOOD}) as plain, encrypted(certificate, {"/x": redirects(plain.url("/y"))}) as server:
        net = Network(frozenset({plain.authority}), believing(certificate, server.port))
        said = refusal(net, "https://files.example/x")
        assert said == ("The redirect of files.example leads from https to http. Expected it to stay encrypted.")
        assert not plain.connections


# Redirects (T3) and what goes along with them (T4).


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/y?a=b", "y?a=b", "{url}/y?a=b", "//{host}/y?a=b", "./z/../y?a=b"])
def test_a_redirect_is_followed(status: int, location: str) -> None:
    with Hostile({"/y": GOOD}) as server:
        where = location.format(url=server.url(""), host=server.authority)
        server.routes = {"/x": redirects(where, status), "/y": GOOD}
        with Deadline(5) as deadline, network(server).get(server.url("/x"), {}, deadline) as answer:
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
    with Hostile({"/x": redirects("/login")}) as server, Deadline(5) as deadline:
        with network(server).get(server.url("/x"), {}, deadline, follow=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (302, "/login")
        assert server.connections == 1


SECRET = {"Authorization": "Bearer canary", "Cookie": "a=canary", "X-Api-Key": "canary"}


def test_credentials_stay_with_their_origin_and_never_come_back() -> None:
    """T4: another port is another origin; Range is no credential and goes along."""
    with Hostile() as first, Hostile() as second:
        first.routes = {"/x": redirects("/y"), "/y": redirects(second.url("/z")), "/end": GOOD}
        second.routes = {"/z": redirects(first.url("/end"))}
        assert body_of(network(first, second), first.url("/x"), {**SECRET, "Range": "bytes=1-"}) == b"good"
        own, foreign, back = (server.asked(path)[0].headers for server, path in
                              ((first, "/y"), (second, "/z"), (first, "/end")))  # fmt: skip
        assert all(own[name] == value for name, value in SECRET.items())
        for headers in (foreign, back):
            assert headers["Range"] == "bytes=1-"
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


# Bodies and their lengths (T5), headers (T6), encodings (T7).


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
    with Hostile({"/x": says(head(200, *headers) + b"good")}) as server, timed(0, 3):
        assert refusal(network(server), server.url("/x")).startswith("The server ")


@pytest.mark.parametrize("raw", [b"SSH-2.0\r\n", b"<html>\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 x y\r\n\r\n"])
def test_what_is_no_http_is_refused(raw: bytes) -> None:
    with Hostile({"/x": says(raw)}) as server:
        assert "does not answer as a web server does" in refusal(network(server), server.url("/x"))


def test_interim_answers_without_end_are_refused() -> None:
    with Hostile({"/x": floods(b"", head(100))}) as server, timed(0, 3):
        assert "Expected HTTP with short headers" in refusal(network(server), server.url("/x"))


def test_a_body_in_memory_is_bounded() -> None:
    with Hostile({"/x": floods(head(200), b"x" * 65536)}) as server, timed(0, 3):
        assert "more than 1048576 bytes" in refusal(network(server), server.url("/x"))


def test_nothing_is_asked_in_an_encoding_nor_by_a_nameless_client() -> None:
    with Hostile({"/x": GOOD}) as server:
        body_of(network(server), server.url("/x"), {"Accept": "*/*", "accept-encoding": "gzip", "host": "x.org"})
        asked = server.requests[0].headers
        assert {name: asked.get_all(name) for name in ("Host", "Accept-Encoding", "User-Agent", "Accept")} == {
            "Host": [server.authority], "Accept-Encoding": ["identity"], "User-Agent": ["klora"], "Accept": ["*/*"],
        }  # fmt: skip


# Time (T6).


@contextlib.contextmanager
def timed(least: float, most: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert least <= time.monotonic() - start <= most


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
    with Hostile({"/x": behaviour}) as server, timed(0.2, 3):
        said = refusal(network(server), server.url("/x"), Unreachable, 0.3)
        assert said == "The download took longer than 0.3 seconds. Expected a faster source."


@every_way_of_being_slow
def test_whatever_a_server_drips_ends_when_it_is_cancelled(behaviour: Behaviour) -> None:
    with Hostile({"/x": behaviour}) as server, timed(0.15, 3):
        deadline = Deadline(30)
        threading.Timer(0.2, deadline.cancel).start()
        with pytest.raises(Cancelled), network(server).get(server.url("/x"), {}, deadline) as answer:
            answer.read_all(1 << 20)


def test_silence_ends_at_the_timeout_of_a_read() -> None:
    with Hostile({"/x": hangs}) as server, timed(0.1, 3):
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
        with timed(0.2, 3):
            assert "does not answer in time" in refusal(net, url, Unreachable)
        with timed(0.1, 3), pytest.raises(Cancelled):
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


def test_what_waits_under_a_deadline_ends_with_its_block() -> None:
    ended = threading.Event()

    def wait(deadline: Deadline) -> None:
        with contextlib.suppress(Cancelled):
            deadline.sleep(30)
        ended.set()

    with Deadline(30) as deadline:
        threading.Thread(target=wait, args=(deadline,)).start()
        assert deadline.left() > 29
    assert ended.wait(3)
    with pytest.raises(Cancelled):
        deadline.left()


def test_a_deadline_leaves_no_thread_and_no_socket_behind() -> None:
    with Hostile({"/x": GOOD, "/y": says(head(200, "Content-Length: 9") + b"half")}) as server:
        refusal(network(server), server.url("/y"), Unreachable)
        gc.collect()
        before = {thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)}
        assert body_of(network(server), server.url("/x")) == b"good"
        assert wait_until(lambda: {t for t in threading.enumerate() if isinstance(t, threading.Timer)} <= before)


def test_a_connection_ends_with_its_block() -> None:
    ended = threading.Event()

    def behave(client: Client) -> None:
        client.send(head(200, "Content-Length: 9") + b"half")
        if not client.sock.recv(1):
            ended.set()

    with Hostile({"/x": behave}) as server, Deadline(5) as deadline:
        with network(server).get(server.url("/x"), {}, deadline) as answer:
            assert not ended.is_set()
        assert ended.wait(3)
        assert answer.status == 200  # and not because nobody holds it any more


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("raw", [head(200, "Content-Length: 9") + b"half", head(200, "Content-Length: -1"), b"SSH\r\n"])
def test_a_connection_is_closed_whatever_came_of_it(raw: bytes) -> None:
    with Hostile({"/x": says(raw)}) as server:
        with contextlib.suppress(SourceError):
            body_of(network(server), server.url("/x"))
        gc.collect()


# JSON of an authority (T2).


def json_of(net: Network, url: str, headers: Mapping[str, str] | None = None, **more: Any) -> Any:
    with Deadline(5) as deadline:
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


def test_a_server_is_given_the_time_that_it_asks_for() -> None:
    """T2: 429 with Retry-After, then 200."""
    with Hostile({"/x": in_turn(reply(b"", "Retry-After: 1", status=429), reply(b"1"))}) as server, timed(1, 4):
        assert json_of(network(server), server.url("/x")) == 1


@pytest.mark.parametrize("asked", ["3600", "Wed, 01 Jan 2188 00:00:00 GMT"])
def test_a_server_that_asks_for_more_time_than_there_is_gets_none(asked: str) -> None:
    with Hostile({"/x": reply(b"", f"Retry-After: {asked}", status=503)}) as server, timed(0, 3):
        with pytest.raises(Unreachable, match="answers 503"):
            json_of(network(server), server.url("/x"))
        assert server.connections == 1


@pytest.mark.parametrize("text", [None, "", "soon", "-5", "1e9", "Fri, 01 Jan 1999 00:00:00 GMT", "9" * 400])
def test_a_retry_after_that_makes_no_sense_is_none(text: str | None) -> None:
    assert seconds_asked(text) == 0


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


@pytest.mark.parametrize("url", ["http://a.example/canary", "https://canary@a.example/", "https://[canary", "x canary"])
def test_a_url_that_is_refused_is_not_quoted(url: str) -> None:
    with pytest.raises(SourceError) as error:
        parse_url(url)
    assert "canary" not in told(error.value)


def test_a_place_does_not_show_its_path() -> None:
    assert "canary" not in repr(parse_url("https://a.example/canary?canary"))


def test_an_answer_says_what_came() -> None:
    with Hostile({"/x": GOOD}) as server, Deadline(5) as deadline:
        url = server.url("/x?y")
        with network(server).get(url, {}, deadline) as answer:
            seen = answer.status, answer.length, answer.who, answer.url, answer.redirected
        assert seen == (200, 4, "The server", url, False)
