"""Web addresses: whose page they are, which part of a query names the file and which grants access to it.

No address is looked up here; where a connection may go is for network.py to say.
"""

import re
from urllib.parse import SplitResult, quote, unquote, urlsplit

from klora.errors import SourceError
from klora.sources.addresses import PORTS
from klora.sources.kinds import Url, plain_path

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# ASCII only: what looks like a letter and is another one has no place in a host's name. Or the inside of [...].
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*|[0-9a-f:.]*:[0-9a-f:.]*")

_DOMAINS = r"(?:huggingface\.co|hf\.co|civitai\.(?:com|green|red)|replicate\.(?:com|delivery))"
_OF_AN_AUTHORITY = re.compile(rf"(?:.*\.)?{_DOMAINS}")
_LOOKS_LIKE_ONE = re.compile(r"huggingface\.|civitai\.|(?:^|\.)hf\.co\.|replicate\.(?:com|delivery)(?:\.|$)")
_BEGINS_WITH_ONE = re.compile(rf"(?:[a-z0-9-]+\.)*{_DOMAINS}(?=[:/?]|$)", re.IGNORECASE)

# What storage services and habit put into a query so that it opens a door: AWS, Google, Azure, Alibaba, Tencent,
# CloudFront, Discord, Akamai; then what people call their own. By name alone: a value tells nothing for certain.
_SECRET = re.compile(
    r"(?:x-(?:amz|goog|oss|cos|ms)|q)-.*"
    r"|se|sp|sv|st|sr|ss|srt|spr|sip|sig|sk(?:oid|tid|t|e|s|v)"
    r"|expires?|expiry|exp|policy|hash-algorithm|ex|is|hm|hdn(?:ts|tl|ea)"
    r"|sign|code|pass|pwd|pw|verify|ticket|rlkey|tempauth|(?:.*(?:[-_]|auth|access|pass|share))?key|.*(?:key-?(?:pair-?)?id|accessid|resourcekey|api-?key).*"
    r"|.*(?:token|secret|signature|passw|credential|session|jwt|hmac).*"
    r"|(?:.*[-_])?o?auth(?:orization|entication|[-_].*)?",
    re.IGNORECASE,
)
_LONGEST_WORD = 20  # characters that a query's part without "=" may have and be no token itself


def begins_with_an_authority(text: str) -> bool:
    """Whether a text without a scheme is the address of a page or file of an authority's: "hf.co/owner/name"."""
    return bool(_BEGINS_WITH_ONE.match(text))


def split(text: str) -> SplitResult:
    """The parts of an http or https address. Raises SourceError where it is malformed, or hides where it leads."""
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname or ""
    except ValueError:  # of which the words would repeat a password
        raise SourceError("its address is malformed. Expected https://host/path.") from None
    if "@" in parts.netloc:
        raise SourceError("its address has a user name in it. Expected https://host/path.")
    if not _HOST.fullmatch(host):
        raise SourceError("its host is none. Expected a name in ASCII letters, digits, hyphens and dots.")
    ours = _OF_AN_AUTHORITY.fullmatch(host)
    if ours and port not in (None, *PORTS.values()):
        raise SourceError(f"its port is {port}. Expected {host} without a port.")
    if not ours and _LOOKS_LIKE_ONE.search(host):
        raise SourceError(
            f"its host, {host}, only looks like an authority's. Expected huggingface.co, civitai.com, ..."
        )
    return parts


def url(parts: SplitResult) -> Url:
    """The file at an address, as split() gave it. Raises SourceError."""
    plain_path(unquote(parts.path))
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, PORTS[parts.scheme]) else f":{parts.port}"
    base = f"{parts.scheme}://{host}{port}{_encoded(parts.path) or '/'}"
    query = _encoded(parts.query)
    pieces = sorted(filter(None, re.split("[&;]", query)), key=_name)
    secret = [piece for piece in pieces if _is_secret(piece)]
    named = [piece for piece in pieces if piece not in secret]
    address = f"{base}?{'&'.join(named)}" if named else base
    return Url(address, request=f"{base}?{query}" if query else base, secret="&".join(secret))


def _is_secret(piece: str) -> bool:
    return bool(_SECRET.fullmatch(_name(piece))) or ("=" not in piece and len(piece) > _LONGEST_WORD)


def _name(piece: str) -> str:
    return unquote(piece.partition("=")[0])


def _encoded(text: str) -> str:
    """With spaces and what is not ASCII encoded, and what is encoded left alone."""
    return quote(text, safe="/%:@!$&'()*+,;=~?[]")
