"""The base models: what each is, where it comes from and which files of its repository are wanted. Knows no HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from klora.errors import BaseModelError


@dataclass(frozen=True)
class Base:
    """Where a base model comes from. family: a key of klora.models.FAMILIES, None for what makes no images.

    revision: a commit, in full.  files: patterns of the paths to fetch, in which * also stands for folders.  gated:
    needs a Hugging Face token whose owner has accepted the licence.  completed_by: None for a diffusers-format folder;
    for a base that is one checkpoint file, the source of the small files that make such a folder of it.
    Sampling defaults are the family's, which reads them off the model.
    """

    family: str | None
    repository: str
    revision: str
    files: tuple[str, ...]
    licence: str
    gated: bool = False
    completed_by: "Base | None" = None

    @property
    def sources(self) -> "tuple[Base, ...]":
        """The repositories of its files, the one with its index last."""
        return (self, self.completed_by) if self.completed_by else (self,)

    @property
    def checkpoint(self) -> str:
        """The path in the repository of the one file that the base is; "" for a diffusers-format folder."""
        return self.files[0] if self.completed_by else ""

    def wants(self, path: str) -> bool:
        """Whether the file at this path of the repository belongs to the base."""
        return any(fnmatchcase(path, pattern) for pattern in self.files)


INDICES = ("model_index.json", "config.json")
"""The file that makes a folder a base: a pipeline's, a single model's."""

_CONFIGS = ("*.json", "*/*.json", "*/*.txt", "*/*.model")
_DIFFUSERS_FILES = (*_CONFIGS, "*/*.safetensors")
_HALF_PRECISION_FILES = (*_CONFIGS, "*/*.fp16.safetensors")
_MODEL_FILES = ("*.json", "*.txt", "model.safetensors")

_SDXL = Base(
    "sdxl",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "462165984030d82259a11f4367a4eed129e94a7b",
    _HALF_PRECISION_FILES,
    "CreativeML Open RAIL++-M",
)

BASES: Mapping[str, Base] = {
    "sdxl": _SDXL,
    "illustrious-xl": Base(
        "sdxl",
        "OnomaAIResearch/Illustrious-XL-v1.0",
        "89d625482edf06d545b740265482f5c8fb2cadb0",
        ("Illustrious-XL-v1.0.safetensors",),
        "CreativeML Open RAIL++-M (as far as is known)",
        completed_by=replace(_SDXL, files=_CONFIGS),
    ),
    "flux-dev": Base(
        "flux",
        "black-forest-labs/FLUX.1-dev",
        "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        _DIFFUSERS_FILES,
        "FLUX.1 [dev] Non-Commercial License",
        gated=True,
    ),
    "flux-schnell": Base(
        "flux",
        "black-forest-labs/FLUX.1-schnell",
        "741f7c3ce8b383c54771c7003378a50191e9efe9",
        _DIFFUSERS_FILES,
        "Apache-2.0",
    ),
    # What describes training pictures, and what finds their subject.
    "captioner": Base(
        None,
        "Salesforce/blip-image-captioning-large",
        "353689b859fcf0523410b1806dace5fb46ecdf41",
        _MODEL_FILES,
        "BSD-3-Clause",
    ),
    "segmenter": Base(
        None, "CIDAS/clipseg-rd64-refined", "999e0328d9e10b484360c477313983f9afdd7050", _MODEL_FILES, "Apache-2.0"
    ),
    "safety-checker": Base(
        None,
        "CompVis/stable-diffusion-safety-checker",
        "cb41f3a270d63d454d385fc2e4f571c487c253c5",
        ("*.json", "*.safetensors"),
        "CreativeML Open RAIL-M",
    ),
}


def base_of(name: str) -> Base:
    """The entry of this name. Raises BaseModelError."""
    if name not in BASES:
        raise BaseModelError(f"There is no base model {name!r}. Expected one of {', '.join(BASES)}.")
    return BASES[name]
