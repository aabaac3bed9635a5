"""The random content and style LoRA of a family, as a request names them and as a command does."""

from pathlib import Path


def pair_of(loras: Path, family: str = "sdxl") -> dict[str, Path]:
    """loras: the folder that conftest makes."""
    return {f"{role}_lora": loras / f"{family}_{role}.safetensors" for role in ("content", "style")}


def named_pair(family: str) -> tuple[str, ...]:
    """In the folder where they lie."""
    return "--content-lora", f"{family}_content.safetensors", "--style-lora", f"{family}_style.safetensors"
