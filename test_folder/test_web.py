"""A link that is nobody's page: its server tells the file from a later one in its place, and how long it is."""

from typing import Any
from urllib.parse import urlsplit

import pytest

from klora.errors import SourceError
from klora.sources import web
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.kinds import Url
from klora.sources.reference import parse
from klora.sources.retries import RETRIES
from test_folder.fakes import SIGNATURE, Storage, fetched, network
from test_folder.fakes.hostile import Behaviour, Hostile, in_turn, redirects, reply
from test_folder.test_formats import GOOD

FIRST = f"bytes 0-0/{len(GOOD)}"


def resolve(server: Any, url: str, *others: Any) -> Download:
    reference = parse(url)
    assert isinstance(reference, Url)
    with Deadline(20) as deadline:
        [found] = web.resolve(reference, network(server, *others), deadline)
    return found


def partial(*headers: str, content_range: str = FIRST) -> Behaviour:
    return reply(GOOD[:1], f"Content-Range: {content_range}", *headers, status=206)


def test_one_byte_is_asked_for_and_nothing_else_is_shown() -> None:
    with Hostile({"/a/dog.safetensors": partial('ETag: "1"')}) as server:
        url = server.url("/a/dog.safetensors")
        assert resolve(server, url) == Download(f'{url} "1"', "dog.safetensors", url, size=len(GOOD))
        [asked] = server.requests
        assert asked.headers["Range"] == "bytes=0-0"
        assert not asked.headers["Authorization"]


def test_a_file_that_is_replaced_has_another_key_and_one_that_stays_the_same() -> None:
    tagged = in_turn(partial('ETag: "1"'), partial('ETag: "1"'), partial('ETag: "2"'))
    dated = in_turn(*(partial(f"Last-Modified: Wed, 0{n} Jan 2020 00:00:00 GMT") for n in (1, 1, 2)))
    both = in_turn(*(partial(f'ETag: "{n}"', "Last-Modified: Wed, 01 Jan 2020 00:00:00 GMT") for n in (1, 1, 2)))
    with Hostile({"/tagged": tagged, "/dated": dated, "/both": both}) as server:
        for path in ("/tagged", "/dated", "/both"):
            first, same, other = (resolve(server, server.url(path)).key for _ in range(3))
            assert first == same != other


def test_a_file_that_nothing_tells_from_a_later_one_is_another_each_time() -> None:
    with Hostile({"/x": partial()}) as server:
        assert len({resolve(server, server.url("/x")).key for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("behaviour", "size"),
    [
        (partial(), len(GOOD)),
        (reply(GOOD), len(GOOD)),  # of a server that knows no ranges
        (partial(content_range="bytes 0-0/*"), None),
        (partial(content_range="bytes 0-5/9"), None),
        (partial(content_range=f"bytes 0-0/{'9' * 30}"), None),
        (reply(b"x", status=206), None),
    ],
)
def test_its_length_is_known_where_the_server_says_it_clearly(behaviour: Behaviour, size: int | None) -> None:
    with Hostile({"/x": behaviour}) as server:
        assert resolve(server, server.url("/x")).size == size


def test_a_signed_link_is_asked_as_it_is_and_its_signature_is_no_part_of_the_key(storage: Storage) -> None:
    url = storage.signed("/a.safetensors", GOOD)
    found = resolve(storage, url)
    assert (found.url, found.credential, found.size) == (url, True, len(GOOD))
    assert SIGNATURE not in f"{found.key} {found.name} {found!r}"
    assert fetched(found, network(storage)) == GOOD
    assert {request.method for request in storage.requests} == {"GET"}  # what it is signed for


def test_what_of_a_query_names_the_file_is_in_the_key() -> None:
    with Hostile({"/x": partial('ETag: "1"')}) as server:
        one, other, signed = (resolve(server, server.url(f"/x?{query}")) for query in ("id=1", "id=2", "id=1&sig=Z"))
        assert one.key == signed.key != other.key
        assert (one.credential, signed.credential) == (False, True)


def test_a_redirect_is_followed_and_asked_for_again_when_the_file_is_fetched() -> None:
    """Where it leads may be signed for minutes only."""
    with Hostile({"/y": partial('ETag: "1"')}) as second, Hostile({"/x": redirects(second.url("/y"))}) as first:
        found = resolve(first, first.url("/x"), second)
        assert found.url == first.url("/x") and urlsplit(found.key).path == '/x "1"'


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [(404, NotFound, 1), (410, NotFound, 1), (401, Denied, 1), (403, Denied, 1), (400, SourceError, 1),
     (503, Unreachable, 1 + RETRIES)],
)  # fmt: skip
def test_a_link_that_gives_no_file_is_refused_as_its_server_answers(
    status: int, kind: type[SourceError], tries: int
) -> None:
    with Hostile({"/x": reply(b"canary", status=status)}) as server:
        with pytest.raises(kind) as error:
            resolve(server, server.url("/x?sig=canary"))
        assert isinstance(error.value, kind) and "canary" not in str(error.value)
        # Storages answer 400, 403 or 404 to a link that has expired.
        assert ("not expired" in str(error.value)) == (status < 500)
        assert server.connections == tries
