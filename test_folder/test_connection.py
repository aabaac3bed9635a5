"""Connections are made to the addresses that were checked, and encrypted for their name (T9)."""

import contextlib
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources.connection import MAX_ADDRESSES, Dialler, trusting
from klora.sources.deadline import Cancelled, Deadline, Patience
from klora.sources.download import Unreachable
from klora.sources.network import Network
from test_folder.asking import GOOD, PUBLIC, body_of, info, refusal
from test_folder.fakes import QUICK, network
from test_folder.fakes.hostile import Behaviour, Client, Hostile, drips, hangs, head, redirects
from test_folder.waiting import timed

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


def test_a_host_of_many_addresses_is_tried_at_a_few() -> None:
    dialled: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        dialled.append(address)
        raise ConnectionRefusedError

    net = Network(dialler=Dialler(QUICK, lambda *_, **__: [info(PUBLIC)] * 100, connect))
    refusal(net, "https://many.example/x", Unreachable)
    assert len(dialled) == MAX_ADDRESSES


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_resolver_that_hangs_holds_nobody_up(cancelled: bool) -> None:
    answer = threading.Event()
    net = Network(dialler=Dialler(Patience(connect=20), lambda *_, **__: answer.wait(20) and []))
    deadline = Deadline(30 if cancelled else 0.3)
    if cancelled:
        threading.Timer(0.3, deadline.cancel).start()
    with timed(0.2), pytest.raises(SourceError) as error, net.get("https://slow.example/", {}, deadline):
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

    return Dialler(QUICK, lambda *_, **__: [info(PUBLIC)], connect, trusting(certificate))


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


def test_a_certificate_that_no_authority_signed_is_refused(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment calls an authority."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with encrypted(certificate, {"/x": GOOD}) as server:
        dialler = believing(certificate, server.port)
        net = Network(dialler=Dialler(QUICK, dialler.resolve, dialler.connect))
        assert "certificate" in refusal(net, "https://files.example/x")
        assert not server.requests


def test_an_encrypted_body_that_ends_without_a_farewell_is_broken(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sits in between could end it so. Some builds of Python forgive it, unless they are told not to."""
    default = ssl.create_default_context

    def forgiving(**options: Any) -> ssl.SSLContext:
        context = default(**options)
        context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        return context

    monkeypatch.setattr(ssl, "create_default_context", forgiving)

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
        with timed(0.3), pytest.raises(kind), net.get("https://files.example/x", {}, deadline) as answer:
            answer.read_all(1 << 20)


def test_an_encrypted_socket_that_is_shut_stays_encrypted(certificate: Path) -> None:
    """Or a read under way might take what is left of the ciphertext for the body."""
    with encrypted(certificate, {}) as server, socket.create_connection(("127.0.0.1", server.port)) as plain:
        context = ssl.create_default_context(cafile=str(certificate))
        deadline = Deadline(20)
        with context.wrap_socket(plain, server_hostname="files.example") as sock, deadline.watch(sock):
            deadline.cancel()
            assert sock.version()
            with pytest.raises(OSError, match=r"Broken pipe|EOF|closed"):
                sock.sendall(b"x")


def test_encryption_is_not_left_on_the_way(certificate: Path) -> None:
    """T3: https to http, even to a host that is trusted."""
    with Hostile({"/y": GOOD}) as plain, encrypted(certificate, {"/x": redirects(plain.url("/y"))}) as server:
        net = Network(frozenset({plain.host}), believing(certificate, server.port))
        said = refusal(net, "https://files.example/x")
        assert said == ("The redirect of files.example leads from https to http. Expected it to stay encrypted.")
        assert not plain.connections
