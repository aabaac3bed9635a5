"""Where a URL leads, and whether anybody may be sent there: a public host over https, or one that the operator trusts.

Pure: resolves nothing, connects to nothing. No message holds a path, a query or an address.
"""

import re
from collections.abc import Set
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import quote, urljoin, urlsplit

from klora.errors import SourceError

PORTS = {"https": 443, "http": 80}

# The registries of special-purpose addresses (iana.org/assignments/iana-ipv4-special-registry). Not
# ipaddress.is_global: Python 3.11 finds multicast, 192.0.0.8 and every way to wrap IPv4 in IPv6 global.
_RESERVED_4 = tuple(
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's metadata, on a public address
    )
)
# What is outside is not in use in public, or wraps IPv4: ::ffff:0:0/96, NAT64's 64:ff9b::/96, fc00::/7, fe80::/10.
_GLOBAL_6 = IPv6Network("2000::/3")
_RESERVED_6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)

_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_LABELS = re.compile(r"(?!.{254})[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_](?:[a-z0-9_-]{0,62}))*")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")  # as a last label: inet_aton would read the whole as an address
_KEPT = "!#$%&'()*+,/:;=?@[]~"  # when what is not ASCII is percent-encoded


@dataclass(frozen=True)
class Target:
    """Where one request goes. host: lower case, IPv6 without brackets; path: with its query, which may be a secret.

    trusted: whether the operator allows it although it is http or private.
    """

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)
    trusted: bool = False

    @property
    def origin(self) -> tuple[str, str, int]:
        """What credentials are for."""
        return self.scheme, self.host, self.port

    @property
    def place(self) -> str:
        """As the operator names what is trusted: "host:port"."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """As the Host header has it: the port only where it is not the scheme's."""
        return self.place.removesuffix(f":{PORTS[self.scheme]}")

    @property
    def url(self) -> str:
        """In full: not for messages."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def who(self) -> str:
        """Its name at the beginning of a message: "The server" for an address, or a host that the operator trusts."""
        return "The server" if self.trusted or _is_address(self.host) else self.host

    def redirected(self, location: str, trusted: Set[str]) -> "Target":
        """Where a Location header leads from here. Raises SourceError, also where encryption would end."""
        subject = f"The redirect of {self.who[0].lower() + self.who[1:]}"
        # http.client reads headers as Latin-1, whatever their bytes mean.
        encoded = quote(location.encode("latin-1"), safe=_KEPT)
        try:
            url = urljoin(self.url, encoded)
        except ValueError:
            url = encoded  # and parse_url tells what is wrong with it
        target = parse_url(url, trusted, subject)
        if (self.scheme, target.scheme) == ("https", "http"):
            raise SourceError(f"{subject} leads from https to http. Expected it to stay encrypted.")
        return target


def parse_url(url: str, trusted: Set[str] = frozenset(), subject: str = "The link") -> Target:
    """Where a URL leads, if anybody may be sent there. trusted: as Target.place. Raises SourceError, of subject."""
    target = read_url(url, subject)
    target = replace(target, trusted=target.place in trusted)
    if not target.trusted and (target.scheme, target.port) != ("https", 443):
        raise SourceError(f"{subject} is {target.scheme} to port {target.port}. Expected https, to port 443.")
    return target


def read_url(url: str, subject: str) -> Target:
    """Where a URL leads, trusted or not. Raises SourceError, of subject."""
    if _UNSAFE.search(url):
        raise SourceError(f"{subject} holds a space, a backslash or a control character. Expected them encoded.")
    try:
        parts = urlsplit(url)
        scheme, netloc, port = parts.scheme, parts.netloc, parts.port
    except ValueError:  # quotes what it could not read
        scheme, netloc, port = "", "", None
    if scheme not in PORTS or not netloc or port == 0:
        raise SourceError(f"{subject} is no web address that can be read. Expected https://host/path.")
    if "@" in netloc:
        raise SourceError(f"{subject} holds a user name before its host. Expected https://host/path; tokens go apart.")
    host = _checked_host(parts.hostname or "", "[" in netloc, subject)
    path = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    return Target(scheme, host, PORTS[scheme] if port is None else port, path)


def is_public(address: str) -> bool:
    """Whether an address, as a resolver spells it, is one of the public internet."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv4Address):
        return not any(parsed in network for network in _RESERVED_4)
    return parsed.scope_id is None and parsed in _GLOBAL_6 and not any(parsed in network for network in _RESERVED_6)


def _checked_host(text: str, bracketed: bool, subject: str) -> str:
    """A name, or an address in its one plain spelling: 0x7f.1 and 2130706433 are addresses to some resolvers."""
    host = text.lower().removesuffix(".")
    if bracketed:
        valid = ":" in host and "%" not in host and _is_address(host)
        host = str(IPv6Address(host)) if valid else host
    else:
        number = _NUMBER.fullmatch(host.rpartition(".")[2])
        valid = _LABELS.fullmatch(host) is not None and (not number or _is_address(host))
    if not valid:
        raise SourceError(f"{subject} names no host. Expected a name in ASCII, as in https://huggingface.co/...")
    return host


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
