"""A web address of no authority -> a download. Its server is asked what tells the file from a later one there."""

import re
import uuid
from urllib.parse import urlsplit

from klora.sources.authority import file_name
from klora.sources.deadline import Deadline
from klora.sources.download import Download
from klora.sources.kinds import Url
from klora.sources.network import Network
from klora.sources.retries import persistently

_TOTAL = re.compile(r"bytes 0-0/(\d{1,18})")


def resolve(reference: Url, net: Network, deadline: Deadline) -> tuple[Download, ...]:
    """The file at an address. With neither an ETag nor a date, it counts as another file each time.

    Raises NotFound, Denied, Unreachable and SourceError as its server answers.
    """

    def attempt() -> tuple[str, int | None]:
        # The first byte and not HEAD: a signed link is signed for one method.
        with net.get(reference.request, {"Range": "bytes=0-0"}, deadline) as answer:
            answer.require(200, 206)
            total = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
            size = answer.length if answer.status == 200 else int(total[1]) if total else None
            return answer.headers["ETag"] or answer.headers["Last-Modified"] or uuid.uuid4().hex, size

    version, size = persistently(attempt, deadline, net.patience.pause)
    name = file_name(urlsplit(reference.address).path)
    key, credential = f"{reference.address} {version}", bool(reference.secret)
    return (Download(key, name, reference.request, size=size, credential=credential),)
