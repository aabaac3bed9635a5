"""K-LoRA (CVPR 2025, arXiv:2502.18461): the subject of one LoRA in the style of another, with no training.

For every adapted layer and every denoising step the paper chooses one of the two LoRAs by their largest weights.
`fuse` makes that choice, `attached` lends the LoRAs to a diffusers model accordingly, `generate` does the whole job.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klora.errors import KLoRAError
    from klora.form.request import Request
    from klora.fusion import Fusion, Schedule, fuse
    from klora.generation import generate
    from klora.layers import attached
    from klora.lora import LoRA, LowRank, save_lora
    from klora.models import FAMILIES, load_model
    from klora.models.flux import Flux
    from klora.models.following import following
    from klora.models.sdxl import SDXL

__version__ = "0.1.0"  # pyproject.toml's, which an image that has klora in a folder cannot be asked for
__all__ = [
    "FAMILIES", "SDXL", "Flux", "Fusion", "KLoRAError", "LoRA", "LowRank", "Request", "Schedule", "attached",
    "following", "fuse", "generate", "load_model", "save_lora",
]  # fmt: skip
_HOMES = {
    "errors": ["KLoRAError"], "form.request": ["Request"], "fusion": ["Fusion", "Schedule", "fuse"],
    "generation": ["generate"], "layers": ["attached"], "lora": ["LoRA", "LowRank", "save_lora"],
    "models": ["FAMILIES", "load_model"], "models.following": ["following"], "models.flux": ["Flux"],
    "models.sdxl": ["SDXL"],
}  # fmt: skip


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if not TYPE_CHECKING:  # to a type checker it would promise every name, misspelt ones too

    def __getattr__(name: str) -> Any:
        """A public name, when it is first asked for: torch takes seconds, and who fetches files needs none."""
        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"klora.{module}"), name)
        raise AttributeError(f"module 'klora' has no attribute {name!r}")
