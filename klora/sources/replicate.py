"""A model trained on Replicate -> the tar of its weights. Replicate's pages redirect to where it lies.

The tar's address, without its query, is its identity: another training has another one.
"""

import re
from urllib.parse import urlsplit

from klora.errors import SourceError
from klora.sources.authority import Client, bearer, file_name
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound
from klora.sources.kinds import ReplicateModel
from klora.sources.network import Network

AUTHORITY = "Replicate"
MAX_PAGES = 5  # that lead to one another

_LOGIN = re.compile(r"/(?:signin|login)\b")


def resolve(
    reference: ReplicateModel, token: str | None, endpoint: str, net: Network, deadline: Deadline
) -> tuple[Download, ...]:
    """The weights of a version, or of a model's newest one. token: the user's; without one nobody's is used.

    Raises NotFound, Denied, Unreachable, and SourceError where Replicate does not lead to a file.
    """
    client = Client(endpoint, bearer(token, AUTHORITY), net, deadline)
    try:
        address = _address(reference, client)
    except NotFound:
        raise NotFound(
            f"{reference} is not on {AUTHORITY}, or was not trained there. Expected replicate:owner/name[:version]."
        ) from None
    except Denied:
        seen = "the token that was given may not read it" if token else "no token was given"
        raise Denied(
            f"{reference} is private, and {seen}. Expected the {AUTHORITY} token of somebody who may read it."
        ) from None
    name = file_name(f"{reference.model.replace('/', '-')}.tar")
    key = urlsplit(address)._replace(query="", fragment="").geturl()
    # No headers: whoever knows the tar's address may have it, and its host is not Replicate's own.
    return (Download(key, name, address, credential=bool(client.headers)),)


def _address(reference: ReplicateModel, client: Client) -> str:
    """Where the weights lie: the first address outside Replicate's pages that they lead to."""
    version = f"/versions/{reference.version}" if reference.version else ""
    page = f"{client.endpoint}/{reference.model}{version}/_weights"
    for _ in range(MAX_PAGES):
        target = client.redirection(page)
        if target is None:
            raise NotFound("a page without weights")
        parts = urlsplit(target)
        if parts[:2] != urlsplit(client.endpoint)[:2]:  # scheme and host
            return target
        if _LOGIN.search(parts.path):
            raise Denied("a login page")
        page = target
    raise SourceError(f"{reference} leads from page to page on {AUTHORITY}. Expected a model that was trained there.")
