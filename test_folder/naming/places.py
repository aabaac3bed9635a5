"""Folders of bases, and the repository that the programs are in."""

from pathlib import Path

KLORA_VARIABLES = ("KLORA_MODELS", "KLORA_BASES", "KLORA_LORA_ROOT")


def folder_of_bases(folder: Path, *names: str) -> Path:
    """A folder with these bases, which hold no more than what says that they are there."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model_index.json").write_text("{}")
    return folder
