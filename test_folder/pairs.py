"""The random content and style LoRA of a family, as a request names them and as a command does."""

from pathlib import Path

from klora.cache import Borrowed


def pair_of(loras: Path, family: str = "sdxl", scores: Path | None = None) -> dict[str, Borrowed]:
    """loras: the folder that conftest makes; scores: where those of fetched ones are kept."""
    files = {f"{role}_lora": loras / f"{family}_{role}.safetensors" for role in ("content", "style")}
    return {name: Borrowed(file, scores and scores / f"{name}.json") for name, file in files.items()}


def named_pair(family: str) -> tuple[str, ...]:
    """In the folder where they lie."""
    return "--content-lora", f"{family}_content.safetensors", "--style-lora", f"{family}_style.safetensors"
