"""Where a link may lead: which hosts, in which spelling, and which addresses are of the public internet (T10)."""

import pytest

from klora.errors import SourceError
from klora.sources.addresses import is_public, parse_url

PRIVATE = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.1.2.3 169.254.169.254
169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.8 192.0.0.170 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1
192.88.99.1 192.168.1.1 192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255
240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1
64:ff9b::7f00:1 64:ff9b::8.8.8.8 64:ff9b:1::a00:1 100::1 2001::1 2001:0:7f00:1:: 2001:2::1 2001:10::1 2001:20::1
2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fe80::1%lo
fec0::1 ff02::1 ff0e::1 2620:4f:8000::1 4000::1 2606:4700::1111%lo /tmp/socket 127.1 huggingface.co
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


def test_a_host_is_no_longer_than_a_name_may_be() -> None:
    assert parse_url(f"https://{'a.' * 125}org/").host
    with pytest.raises(SourceError, match=r"^The link names no host\."):
        parse_url(f"https://{'a.' * 126}org/")


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


def test_messages_name_a_public_host_and_nothing_of_the_operators() -> None:
    said = {url: parse_url(url, {"inside.example:80"}).who for url in ("http://inside.example/", "https://a.example/")}
    assert said == {"http://inside.example/": "The server", "https://a.example/": "a.example"}


@pytest.mark.parametrize("url", ["http://a.example/canary", "https://canary@a.example/", "https://[canary", "x canary"])
def test_a_url_that_is_refused_is_not_quoted(url: str) -> None:
    with pytest.raises(SourceError) as error:
        parse_url(url)
    assert "canary" not in f"{error.value!r} {error.value.__context__!r}"


def test_a_place_does_not_show_its_path() -> None:
    assert "canary" not in repr(parse_url("https://a.example/canary?canary"))
