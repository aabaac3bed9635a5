"""A hub on this machine, and what resolves its references."""

from collections.abc import Iterator

import pytest

from klora.sources import hub
from klora.sources.deadline import Deadline
from klora.sources.download import Download
from klora.sources.kinds import HubFile
from klora.sources.network import Network
from klora.sources.reference import parse
from test_folder.fakes import Storage
from test_folder.fakes.hub import Hub
from test_folder.hub.readers import ANN, BOB, Resolve


@pytest.fixture
def authority(storage: Storage) -> Iterator[Hub]:
    with Hub(storage) as authority:
        authority.tokens_issued = {ANN, BOB}
        yield authority


@pytest.fixture
def resolve(authority: Hub, net: Network) -> Resolve:
    """What a reference, as people write it, comes to."""

    def resolved(text: str, token: str | None = None) -> tuple[Download, ...]:
        reference = parse(text)
        assert isinstance(reference, HubFile)
        with Deadline(20) as deadline:
            return hub.resolve(reference, token, authority.url, net, deadline)

    return resolved
