"""Whom the tests' hub knows, and what asks it."""

from collections.abc import Callable

from klora.sources.download import Download

ANN, BOB = "hf_AnnsCanary", "hf_BobsCanary"
Resolve = Callable[..., tuple[Download, ...]]
