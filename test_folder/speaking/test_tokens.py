"""The playground's token goes to the server that it is for, and nowhere else."""

from pathlib import Path

import pytest

from playground.connection import Connection
from playground.errors import PlaygroundError
from test_folder.speaking.answering import answering


@pytest.mark.parametrize("url", ["http://gpu.example:5000", "http://10.0.0.7"])
def test_a_token_travels_encrypted_or_not_at_all(url: str) -> None:
    with pytest.raises(PlaygroundError, match="unencrypted") as refused:
        Connection(url, "s3cret")
    assert "s3cret" not in str(refused.value)
    assert Connection(f" {url}/\n").url == url


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "127.0.0.1:5000", "http://", "http://x:port", "http://me:pw@x", "http://[::1"]
)
def test_an_address_is_http(url: str) -> None:
    with pytest.raises(PlaygroundError, match=r"Expected one as http://127\.0\.0\.1:5000"):
        Connection(url)


def test_the_token_goes_to_the_server_and_to_no_place_that_it_names(tmp_path: Path) -> None:
    with answering(lambda *_: (200, b"png")) as storage, answering(lambda *_: (200, {})) as server:
        way = Connection(server.url, "s3cret")
        way.call("GET", "/openapi.json")
        assert way.fetch(f"{storage.url}/a.png") == b"png"
        with pytest.raises(PlaygroundError, match="Expected one of its own"):
            way.call("GET", f"{storage.url}/predictions/1")
    assert [token for *_, token in server.asked] == ["Bearer s3cret"]
    assert [token for *_, token in storage.asked] == [None]


def test_a_redirect_is_not_followed_with_the_token() -> None:
    with answering(lambda *_: (200, {})) as elsewhere:
        moved = (302, {}, {"Location": f"{elsewhere.url}/health-check"})
        with answering(lambda *_: moved) as server, pytest.raises(PlaygroundError, match="302"):
            Connection(server.url, "s3cret").get("/health-check")
    assert elsewhere.asked == []


def test_no_login_of_the_machine_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with answering(lambda *_: (200, {})) as server:
        Connection(server.url).get("/health-check")
        Connection(server.url).fetch(f"{server.url}/file")
    assert [token for *_, token in server.asked] == [None, None]


def test_a_token_that_is_no_header_is_in_no_message() -> None:
    with pytest.raises(PlaygroundError) as refused:
        Connection("https://api.example", "s3cret\nX: y")
    assert "s3cret" not in str(refused.value)
