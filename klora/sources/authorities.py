"""Whom to ask about a reference, and where they are: one way from any reference to its downloads."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from klora.errors import SourceError
from klora.sources import civitai, hub, replicate, web
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.fetch import Sink, fetch
from klora.sources.kinds import Bare, CivitaiFile, HubFile, Reference, ReplicateModel, Url
from klora.sources.network import Network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Authorities:
    """Their addresses, without a slash at the end, and the network that leads there.  max_bytes: of one file."""

    hub: str = "https://huggingface.co"
    civitai: str = "https://civitai.com"
    replicate: str = "https://replicate.com"
    network: Network = field(default_factory=Network)
    max_bytes: int = 2 << 30

    def resolve(self, reference: Reference, tokens: Mapping[str, str], deadline: Deadline) -> tuple[Download, ...]:
        """The downloads that a reference comes to now, the LoRA first.

        tokens: of the user's, by authority, "hf", "civitai", "replicate". Raises NotFound, Denied, Unreachable, or
        SourceError where it is no LoRA, or larger than one may be.
        """
        downloads = self._ask(reference, tokens, deadline)
        for download in downloads:
            if (download.size or 0) > self.max_bytes:  # before anybody makes room for it
                raise SourceError(f"{download.name} is {download.size} bytes long. Expected at most {self.max_bytes}.")
        return downloads

    def _ask(self, reference: Reference, tokens: Mapping[str, str], deadline: Deadline) -> tuple[Download, ...]:
        match reference:
            case HubFile():
                return hub.resolve(reference, tokens.get("hf"), self.hub, self.network, deadline)
            case CivitaiFile():
                return civitai.resolve(reference, tokens.get("civitai"), self.civitai, self.network, deadline)
            case ReplicateModel():
                return replicate.resolve(reference, tokens.get("replicate"), self.replicate, self.network, deadline)
            case Url():
                return web.resolve(reference, self.network, deadline)
            case Bare():
                return self._resolve_bare(reference, tokens, deadline)
        raise TypeError(f"nobody is asked about {reference}")

    def fetch(self, download: Download, sink: Sink, deadline: Deadline) -> str:
        """Write a download into sink; its sha256 in hex. Raises SourceError and what is below it."""
        return fetch(download, sink, self.network, deadline, self.max_bytes)

    def _resolve_bare(self, reference: Bare, tokens: Mapping[str, str], deadline: Deadline) -> tuple[Download, ...]:
        """The downloads of Replicate's model, if one of that name was trained there; else of Hugging Face's."""
        model, repository = reference.candidates()
        for candidate in (model, repository):
            try:
                downloads = self.resolve(candidate, tokens, deadline)
            except NotFound:
                continue
            except (Denied, Unreachable) as error:
                if candidate == repository:
                    raise type(error)(f"{model} is not on Replicate, and {error}") from None
                raise type(error)(f"{error} Or {repository}, where Hugging Face's is meant.") from None
            logger.info("%s is %s", reference, candidate)
            return downloads
        raise NotFound(
            f"{reference} is neither a model that was trained on Replicate nor a Hugging Face repository. Expected "
            "replicate:owner/name or hf:owner/name."
        )
