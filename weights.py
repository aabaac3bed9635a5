"""A LoRA reference or a base's name -> a path on disk; the table of base models. The environment is read here only.

Knows nothing of torch, pipelines or the web form.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError

from klora.errors import BaseModelError, LoRAError

logger = logging.getLogger(__name__)

TOYS = Path(__file__).resolve().parent / "examples" / "toy"  # not there where klora is installed as a package


@dataclass(frozen=True)
class Base:
    """Where a base model comes from. family: a key of klora.models.FAMILIES, None for what makes no images.

    files: the patterns of what to fetch from the repository, at this revision.  gated: needs a Hugging Face token
    whose owner has accepted the licence.
    """

    family: str | None
    repository: str
    revision: str
    files: tuple[str, ...]
    licence: str
    gated: bool = False


class Installed(NamedTuple):
    """A base model on disk. family: a key of klora.models.FAMILIES; path: its diffusers-format folder."""

    name: str
    family: str
    path: Path


_CONFIGS = ("*.json", "*/*.json", "*/*.txt", "*/*.model")
_SDXL_FILES = (*_CONFIGS, "*/*.fp16.safetensors")
_FLUX_FILES = (*_CONFIGS, "*/*.safetensors")

BASES: Mapping[str, Base] = {
    "sdxl": Base(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        _SDXL_FILES,
        "CreativeML Open RAIL++-M",
    ),
    "illustrious-xl": Base(
        "sdxl", "OnomaAIResearch/Illustrious-XL-v1.0", "main", _FLUX_FILES, "Illustrious Community Licence"
    ),
    "flux-dev": Base(
        "flux",
        "black-forest-labs/FLUX.1-dev",
        "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        _FLUX_FILES,
        "FLUX.1 [dev] Non-Commercial License",
        gated=True,
    ),
    "flux-schnell": Base(
        "flux",
        "black-forest-labs/FLUX.1-schnell",
        "741f7c3ce8b383c54771c7003378a50191e9efe9",
        _FLUX_FILES,
        "Apache-2.0",
    ),
    # What describes training pictures, and what finds their subject.
    "captioner": Base(
        None, "Salesforce/blip-image-captioning-large", "main", ("*.json", "*.txt", "model.safetensors"), "BSD-3-Clause"
    ),
    "segmenter": Base(
        None, "CIDAS/clipseg-rd64-refined", "main", ("*.json", "*.txt", "model.safetensors"), "Apache-2.0"
    ),
    "safety-checker": Base(
        None,
        "CompVis/stable-diffusion-safety-checker",
        "cb41f3a270d63d454d385fc2e4f571c487c253c5",
        ("*.json", "*.safetensors"),
        "CreativeML Open RAIL-M",
    ),
}


def models_folder() -> Path:
    """KLORA_MODELS, else ~/.cache/klora/models: one folder a base."""
    return Path(os.environ.get("KLORA_MODELS") or Path.home() / ".cache" / "klora" / "models")


def use_toys_if_no_bases(toys: Path = TOYS) -> None:
    """Make the toy bases the installed ones, and say so, where KLORA_MODELS is unset and no base is installed.

    Unless KLORA_LORA_ROOT is set, requests may then name the toys' LoRA files.  For programs that people start by hand;
    predict.py never calls it, for a container without its bases must not serve toys.
    """
    if os.environ.get("KLORA_MODELS") or installed_bases() or not _bases_in(toys):
        return
    os.environ["KLORA_MODELS"] = str(toys)
    os.environ["KLORA_LORA_ROOT"] = os.environ.get("KLORA_LORA_ROOT") or str(toys / "loras")
    logger.warning(
        "No base models in ~/.cache/klora/models: using the toy ones in examples/toy (pictures of shapes). "
        "Set KLORA_MODELS for real ones."
    )


def installed_bases() -> list[str]:
    """The bases whose folders are there, in the order of the table. Raises BaseModelError."""
    return _bases_in(models_folder())


def _bases_in(folder: Path) -> list[str]:
    try:
        return [name for name, base in BASES.items() if base.family and (folder / name / "model_index.json").is_file()]
    except OSError as error:
        raise BaseModelError(
            f"The folder of base models is {folder.absolute()}, which cannot be read: {error.strerror}. "
            "Expected KLORA_MODELS to name one that can."
        ) from error


def resident_bases() -> list[Installed]:
    """The bases to load at set-up: KLORA_BASES, separated by commas, else every installed one. Raises BaseModelError.

    That none is installed is an error, too: such a server could answer nothing.
    """
    named = [name.strip() for name in os.environ.get("KLORA_BASES", "").split(",") if name.strip()]
    names: Sequence[str | None] = named or installed_bases() or [None]
    return [find_base(name) for name in names]


def find_base(name: str | None, family: str | None = None) -> Installed:
    """The base of this name; without one, the first installed base of the family, or of any. Raises BaseModelError."""
    known = {base: facts.family for base, facts in BASES.items() if facts.family}
    wanted = [base for base in known if name == base or (name is None and family in (None, known[base]))]
    if not wanted:
        raise BaseModelError(f"There is no base model {name!r}. Expected one of {', '.join(known)}.")
    installed = installed_bases()
    found = next((base for base in wanted if base in installed), None)
    if found is None:
        what = name or (f"A base model for {family} LoRAs" if family else "A base model")
        raise BaseModelError(f"{what} is not installed: {_lack_of(wanted, installed)}")
    return Installed(found, known[found], models_folder() / found)


def _lack_of(wanted: list[str], installed: list[str]) -> str:
    """What is in the folder of base models instead of one of the wanted, and how it gets there."""
    folder = models_folder().absolute()
    seen = f"{folder} has {', '.join(installed) or 'no base model'}" if folder.is_dir() else f"{folder} is no folder"
    places = " or ".join(f"{BASES[name].repository} in {folder / name}" for name in wanted)
    return (
        f"{seen}. Expected {places}, downloaded from Hugging Face with its model_index.json, or KLORA_MODELS set to "
        "another folder of base models; script/make-toy-bases makes toy ones in examples/toy."
    )


def training_base(name: str) -> dict[str, Any]:
    """The base of this name, by the fields of klora.training.job.TrainingBase. Raises BaseModelError."""
    found = find_base(name)._asdict()
    return found | {"repository": BASES[name].repository, "licence": BASES[name].licence, "annotators": models_folder()}


def safety_checker_path() -> Path:
    """The folder of the safety checker, whether or not it is there."""
    return models_folder() / "safety-checker"


def lora_root() -> Path | None:
    """KLORA_LORA_ROOT: the one folder from which requests may name local LoRA files. None, the default: none may."""
    root = os.environ.get("KLORA_LORA_ROOT")
    return Path(root) if root else None


def lora_paths(references: Mapping[str, str], root: Path | None) -> dict[str, Path]:
    """The files that a request's LoRA references name, by input. Raises LoRAError."""
    return {name: lora_path(reference, root, name) for name, reference in references.items()}


def lora_path(reference: str, root: Path | None, name: str) -> Path:
    """The file below root that a LoRA reference names. name: the input, for the message. Raises LoRAError.

    The message says nothing of what lies elsewhere.
    """
    if root is None:
        raise LoRAError(f"{name} is {reference!r}, but this server takes no LoRA paths: KLORA_LORA_ROOT is not set.")
    try:
        path = (root / reference).resolve()
        inside = path.is_relative_to(root.resolve()) and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that the file system cannot take, a link that goes round
        inside = False
    if not inside:
        raise LoRAError(
            f"{name} is {reference!r}. Expected the path of a .safetensors file in the server's LoRA folder."
        )
    return path


def download_base(name: str, folder: Path | None = None, token: str | None = None) -> Path:
    """Fetch a base from the Hugging Face hub into folder/name, resuming what is there. Raises BaseModelError."""
    if name not in BASES:
        raise BaseModelError(f"There is no base model {name!r}. Expected one of {', '.join(BASES)}.")
    base, target = BASES[name], (folder or models_folder()) / name
    asking: str | Literal[False] = token or False  # never the machine's own login
    try:
        # Asked first: where the folder has begun, snapshot_download only warns of a refusal and returns what is there.
        HfApi().list_repo_files(base.repository, revision=base.revision, token=asking)
        snapshot_download(
            base.repository, revision=base.revision, allow_patterns=list(base.files), local_dir=target, token=asking
        )
    except GatedRepoError as error:
        raise BaseModelError(
            f"{name} is gated: accept the licence at huggingface.co/{base.repository} and give a token."
        ) from error
    except Exception as error:  # a hub out of reach raises what its HTTP library raises, a portal a JSON error
        raise BaseModelError(f"{name} cannot be fetched from {base.repository}: {error}") from error
    if not any((target / index).is_file() for index in ("model_index.json", "config.json")):
        raise BaseModelError(
            f"{base.repository} at {base.revision} holds nothing of {name}. Expected a diffusers folder."
        )
    return target
