"""Hugging Face's answers to one who may not read."""

from collections.abc import Callable

import pytest

from klora.errors import SourceError
from klora.sources.download import Download

ANN, BOB = "hf_AnnsCanary", "hf_BobsCanary"
Resolve = Callable[..., tuple[Download, ...]]


def refused(resolve: Resolve, kind: type[SourceError], text: str, token: str | None) -> str:
    with pytest.raises(kind) as error:
        resolve(text, token)
    assert type(error.value) is kind and error.value.__suppress_context__
    assert not {ANN, BOB} & set(str(error.value).split())
    return str(error.value)
