"""Pictures, packed into uploads of every form, and what is said of those that are not used."""

import io
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klora.errors import RequestError
from klora.training.dataset import Limits, Skipped, read_upload

Files = Mapping[str, bytes]


def drawn(color: str = "red", size: tuple[int, int] = (80, 70)) -> Image.Image:
    """A picture with a white top left corner, so that turning it shows."""
    image = Image.new("RGB", size, color)
    image.paste((255, 255, 255), (0, 0, size[0] // 4, size[1] // 4))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


PNG = encoded(drawn())
DEFAULT = Limits()
NOISE = random.Random(0).randbytes(2 << 20)


def in_folder(path: Path, files: Files) -> Path:
    for name, data in files.items():
        (path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "folder" / name).write_bytes(data)
    return path / "folder"


def in_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path / "upload", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path / "upload"


def tar_bytes(files: Files, mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def in_tar(path: Path, files: Files) -> Path:
    (path / "upload").write_bytes(tar_bytes(files))
    return path / "upload"


def in_tar_gz(path: Path, files: Files) -> Path:
    (path / "upload").write_bytes(tar_bytes(files, "w:gz"))
    return path / "upload"


every_form = pytest.mark.parametrize("pack", [in_folder, in_zip, in_tar, in_tar_gz])


def reasons(skipped: list[Skipped]) -> dict[str, str]:
    return {item.name: item.reason for item in skipped}


def refusal(path: Path, limits: Limits = DEFAULT) -> str:
    with pytest.raises(RequestError) as error:
        read_upload(path, limits)
    return str(error.value)
