"""For whom a fetched file is: everybody, or whoever shows the same credential again."""

import hashlib
import hmac
from collections.abc import Mapping

from klora.cache.refs import PUBLIC
from klora.sources.kinds import Bare, CivitaiFile, HubFile, Reference, ReplicateModel, Url

Tokens = Mapping[str, str]

_AUTHORITIES: Mapping[type, tuple[str, ...]] = {
    HubFile: ("hf",),
    CivitaiFile: ("civitai",),
    ReplicateModel: ("replicate",),
    Bare: ("replicate", "hf"),
}


def scope_of(reference: Reference, tokens: Tokens, secret: bytes) -> str:
    """PUBLIC where the request has nothing that its authority, or a signed link, would accept as a credential.

    Else the credential's keyed hash, which tells nothing of it to whoever reads the cache without the secret.
    tokens: by authority, "hf", "civitai", "replicate".
    """
    used = [
        (authority, tokens[authority]) for authority in _AUTHORITIES.get(type(reference), ()) if tokens.get(authority)
    ]
    if isinstance(reference, Url) and reference.secret:
        used.append(("url", reference.secret))
    if not used:
        return PUBLIC
    return hmac.new(secret, repr(used).encode(), hashlib.sha256).hexdigest()
