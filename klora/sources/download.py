"""What a reference comes to once its authority has been asked: what to fetch, and what is known of it beforehand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from klora.errors import SourceError
from klora.file_names import CONFIG

# By the key of klora.models.FAMILIES, "" for none of ours: CivitAI's words for base models, a list to choose from, and
# the repositories on Hugging Face of models that are none of ours. Whoever names one of ours may mean a finetune of it.
_FAMILIES = {
    "sdxl": re.compile(r"SDXL .*|Pony|Illustrious|NoobAI"),
    "flux": re.compile(r"Flux\.1 .*"),
    "": re.compile(
        r"(SD [123]|Flux\.2|Wan|Hunyuan|Qwen|HiDream|SVD|LTXV\d?|CogVideoX|PixArt|AuraFlow|Pony V7|ZImage(Turbo|Base)"
        r"|Krea 2|Anima|Lumina|Mochi|Kolors|Chroma"  # the last two have our layers' names and shapes
        r"|black-forest-labs/FLUX\.2|Qwen/Qwen-Image|Tongyi-MAI/Z-Image|Kwai-Kolors/Kolors|lodestones/Chroma\d?"
        r"|briaai/FIBO|meituan-longcat/LongCat-Image|ostris/Flex)\b.*"
    ),
}

# By the base's name in klora.bases.table: the words for it of both. A finetune is none of them.
_BASES = {
    "sdxl": re.compile(r"SDXL .*|stabilityai/stable-diffusion-xl-base-1\.0"),
    "illustrious-xl": re.compile(r"Illustrious|OnomaAIResearch/Illustrious-(XL|xl)-.*"),
    "flux-dev": re.compile(r"Flux\.1 D|black-forest-labs/FLUX\.1-dev"),
    "flux-schnell": re.compile(r"Flux\.1 S|black-forest-labs/FLUX\.1-schnell"),
}


@dataclass(frozen=True)
class Download:
    """One file to fetch.

    key: its immutable identity, without any secret: "hf:owner/name@<commit>/<path>", "civitai:<version>+<file>".
    name: what people may call it and what it is called on the disk: letters, digits, "._-", at most 80.
    url: may be signed.   headers: for the origin of url alone, never for one that it redirects to.
    size: in bytes, sha256: in hex, where the authority gives them; None where it does not.
    credential: whether a token was sent to resolve it, or would be to fetch it.
    base_model, triggers: what the authority says of it: the model that it was made for, words that call it.
    """

    key: str
    name: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int | None = None
    sha256: str | None = None
    credential: bool = False
    base_model: str | None = None
    triggers: tuple[str, ...] = ()

    @property
    def holds_weights(self) -> bool:
        """Whether this is a file of tensors; else it is the adapter_config.json beside a PEFT repository's."""
        return self.name != CONFIG


def family_of(base_model: str | None) -> str | None:
    """The family, a key of FAMILIES, of a base model that an authority names; "" for a model that surely is of none;
    None where the name does not tell, as on most pages of Hugging Face."""
    return next((family for family, names in _FAMILIES.items() if names.fullmatch(base_model or "")), None)


def base_of(base_model: str | None) -> str:
    """The name, in klora.bases.table, of a base model that an authority names; "" for one that is not there."""
    return next((base for base, names in _BASES.items() if names.fullmatch(base_model or "")), "")


class NotFound(SourceError):
    """Raised when the authority knows no such thing; it may later."""


class Denied(SourceError):
    """Raised when the authority wants a token, or another one."""


class Unreachable(SourceError):
    """Raised when the authority does not answer, or fails: what is cached for everybody may then still serve."""
