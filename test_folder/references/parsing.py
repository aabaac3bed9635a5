"""A sha256 to pin by, and the sentence with which a reference is refused."""

import pytest

from klora.errors import SourceError
from klora.sources.reference import parse

PIN = "ab" * 32


def refusal(text: str) -> str:
    with pytest.raises(SourceError) as error:
        parse(text)
    return str(error.value)
