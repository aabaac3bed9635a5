"""From an upload to pictures with captions. Knows nothing of torch, of models or of Cog."""

import csv
import hashlib
import io
import json
import posixpath
import re
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from klora.errors import RequestError
from klora.form.fields import HALF_CHARACTER
from klora.form.request import MAX_PIXELS, opaque, upright
from klora.training.archive import CAPTION_KEYS, Intake, Limits, Skipped, unpack
from klora.training.config import whole_word

MIN_SIDE = 64  # pixels
MAX_TEXT_BYTES = 16 << 20  # of one caption file
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
ARCHIVES = (b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"PAR1")
SIDECARS = (".txt", ".caption", ".json", ".cls")
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_KEYS = ("image_file", "file_name", "image", "filename")
# What Pillow's decoders raise for damaged files.
UNDECODABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, RuntimeError,
               struct.error)  # fmt: skip

Size = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """An image file that is known to decode, with what goes with it. name: its path in the upload, only a label."""

    name: str
    data: bytes
    caption: str | None
    mask: bytes | None

    @cached_property
    def fingerprint(self) -> str:
        """What is learnt from of it, image, caption and mask, whatever its name: equal where these are."""
        return json.dumps([_sha256(self.data), self.caption, None if self.mask is None else _sha256(self.mask)])

    def open(self) -> Image.Image:
        """The picture as its maker saw it: RGB, turned as its EXIF says, over white, the first frame."""
        return _decoded(self.data, "white")

    def open_mask(self) -> Image.Image | None:
        """Where the picture counts, white; L, as large as the picture, black where it is transparent."""
        return None if self.mask is None else _decoded(self.mask, "black").convert("L")


def read_upload(path: Path, limits: Limits = Limits()) -> tuple[list[Picture], list[Skipped]]:  # noqa: B008  frozen
    """Pictures in the natural order of their names, and what was left out. Raises RequestError.

    Captions: a .txt, .caption, .json or .cls beside the picture with its name or its stem, metadata.jsonl, a table that
    is metadata.csv or *caption*.csv, in this order; the first one stays. Masks: STEM.mask.png beside the picture, or
    its stem in a folder masks/ there.
    """
    intake = unpack(path, limits)
    names = sorted(intake.files, key=_natural)
    sizes = _sizes([name for name in names if not _is_text(name)], intake)
    masked = {name: target for name in sizes if (target := _masked(name)) is not None}
    pictures = [name for name in sizes if name not in masked]
    captions = _captions([name for name in names if _is_text(name)], pictures, intake)
    masks = _masks(masked, sizes, intake)
    skipped = sorted(intake.skipped, key=lambda item: _natural(item.name))
    if not pictures:
        reasons = "; ".join([f"{intake.members} files seen", *(f"{item.name!r} {item.reason}" for item in skipped[:3])])
        raise RequestError(f"input_images has no usable picture: {reasons}. Expected {', '.join(FORMATS)} files.")
    return [Picture(name, intake.files[name], captions.get(name), masks.get(name)) for name in pictures], skipped


def dataset_hash(pictures: Iterable[Picture]) -> str:
    """SHA-256 of what is learnt from, images, captions and masks, whatever their names and order."""
    return _sha256("\n".join(sorted(picture.fingerprint for picture in pictures)).encode())


def captioned(picture: Picture, trigger: str, template: str) -> str:
    """The picture's caption with the trigger in place of [trigger], or in front; without a caption, the template."""
    text = (picture.caption or template).replace("[trigger]", trigger)
    if not picture.caption or re.search(whole_word(trigger), text):
        return text
    return f"{trigger}, {text}"


def _decoded(data: bytes, backdrop: str) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        if file.width * file.height > MAX_PIXELS:
            raise RequestError(f"has {file.width}x{file.height} pixels, more than {MAX_PIXELS}")
        image = upright(file)
    if image.mode in ("F", "LAB"):
        raise RequestError(f"holds {image.mode} pixels, neither grey, palette, RGB nor CMYK")
    return opaque(image, backdrop)


def _sizes(names: Sequence[str], intake: Intake) -> dict[str, Size]:
    """Size of every file that can be trained on: it decodes to its last row, and is large enough."""
    sizes = {}
    for name in names:
        try:
            sizes[name] = _size(intake.files[name])
        except RequestError as error:
            intake.skip(name, str(error))
        except Image.DecompressionBombError:
            intake.skip(name, f"has more than {MAX_PIXELS} pixels")
        except UNDECODABLE as error:
            intake.skip(name, f"cannot be decoded: {error}")
    return sizes


def _size(data: bytes) -> Size:
    try:
        width, height = _decoded(data, "white").size
    except UnidentifiedImageError as error:
        nested = data.startswith(ARCHIVES)
        raise RequestError("is an archive in the upload" if nested else "is no image that is known here") from error
    if min(width, height) < MIN_SIDE:
        raise RequestError(f"is {width}x{height}, smaller than {MIN_SIDE} pixels")
    return width, height


def _is_text(name: str) -> bool:
    base = posixpath.basename(name).lower()
    return base.endswith(SIDECARS) or base in METADATA or ("caption" in base and base.endswith(".csv"))


def _masked(name: str) -> str | None:
    """What a mask's name says of its picture: the path without suffix. None if it is no mask's name."""
    stem = posixpath.splitext(name)[0]
    if stem.lower().endswith(".mask"):
        return stem[: -len(".mask")]
    *folders, base = stem.split("/")
    if "masks" not in folders:
        return None
    at = folders.index("masks")
    return "/".join([*folders[:at], *folders[at + 1 :], base])


def _captions(texts: Sequence[str], pictures: Sequence[str], intake: Intake) -> dict[str, str]:
    owners = _owners(pictures)
    captions: dict[str, str] = {}
    for name in sorted(texts, key=_weakness):
        try:
            entries = _entries(name, intake)
        except (ValueError, RecursionError, csv.Error) as error:
            intake.skip(name, f"cannot be read: {error}")
            continue
        for target, caption in entries:
            found = _owned(owners, target)
            if fresh := [picture for picture in found if picture not in captions]:
                captions |= dict.fromkeys(fresh, caption)
            else:
                intake.skip(name, f"has a caption for {target!r}, which {'has one' if found else 'is no picture here'}")
    return captions


def _masks(masked: Mapping[str, str], sizes: Mapping[str, Size], intake: Intake) -> dict[str, bytes]:
    owners = _owners([name for name in sizes if name not in masked])
    masks: dict[str, bytes] = {}
    for mask, target in masked.items():
        found = [name for name in _owned(owners, target) if sizes[name] == sizes[mask] and name not in masks]
        masks |= dict.fromkeys(found, intake.files[mask])
        if not found:
            own, *others = ("{}x{}".format(*sizes[name]) for name in (mask, *_owned(owners, target)))
            seen = f"of its name: {' and '.join(others) or 'none'}"
            intake.skip(mask, f"is a mask of {own}, and no picture of its name and size lacks one ({seen})")
    return masks


def _owners(pictures: Sequence[str]) -> dict[str, list[str]]:
    """Pictures by what may name them: path, path without suffix, either one in lower case."""
    owners: dict[str, list[str]] = {}
    for name in pictures:
        stem = posixpath.splitext(name)[0]
        for key in {name, stem, f"?{name.casefold()}", f"?{stem.casefold()}"}:
            owners.setdefault(key, []).append(name)
    return owners


def _owned(owners: Mapping[str, list[str]], target: str) -> list[str]:
    return owners.get(target) or owners.get(f"?{target.casefold()}") or []


def _weakness(name: str) -> tuple[int, str]:
    return (*SIDECARS, ".jsonl", ".csv").index(posixpath.splitext(name)[1].lower()), name


def _entries(name: str, intake: Intake) -> list[tuple[str, str]]:
    """Pairs of a path, with or without suffix, and a caption. Raises ValueError, RecursionError and csv.Error."""
    data = intake.files[name]
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"it has more than {MAX_TEXT_BYTES} bytes")
    stem, suffix = posixpath.splitext(name)
    text = _text(data)
    match suffix.lower():
        case ".csv":
            return _rows(name, _table(text), intake)
        case ".jsonl":
            # Not by splitlines(), which also splits at what JSON allows in a text: U+2028, U+2029, U+0085.
            return _rows(name, [json.loads(line) for line in text.split("\n") if line.strip()], intake)
        case ".json":
            caption = _first(json.loads(text), CAPTION_KEYS)
        case _:
            caption = text
    caption = _one_line(caption)
    if suffix.lower() == ".cls" and caption.isdigit():
        raise ValueError("it names a class by number, not in words")
    return [(stem, caption)] if caption else []


def _table(text: str) -> list[dict[str, str]]:
    """The rows of a CSV. Raises ValueError for a first line that is no header, and would be lost as one."""
    lines, separator = io.StringIO(text, newline=""), _separator(text)
    reader = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)  # or a quote behind one opens nothing
    for keys in (FILE_KEYS, CAPTION_KEYS):
        if not set(keys).intersection(reader.fieldnames or ()):
            raise ValueError(f"its first line names no column {', '.join(keys[:-1])} or {keys[-1]}")
    return list(reader)


def _separator(text: str) -> str:
    """What parts the names of the first line: spreadsheets write semicolons where decimals have commas."""
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _rows(name: str, rows: Sequence[object], intake: Intake) -> list[tuple[str, str]]:
    """The rows that can be read; those that cannot are reported one by one. Raises ValueError when none can."""
    pairs, faults = [], []
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, dict) and any(row.get(None, ())):  # csv's key for cells that no column has
                raise ValueError(
                    "one of more cells than the first line names, where a text with separators needs quotes"
                )
            pairs.append((_first(row, FILE_KEYS).replace("\\", "/"), _one_line(_first(row, CAPTION_KEYS))))
        except ValueError as error:
            faults.append(f"record {number} is {error}")
    if faults and not pairs:
        raise ValueError(faults[0])
    for fault in faults:
        intake.skip(name, fault)
    folder = posixpath.dirname(name)
    named = [(posixpath.normpath(posixpath.join(folder, file)), caption) for file, caption in pairs if caption]
    return [(unicodedata.normalize("NFC", file), caption) for file, caption in named]


def _one_line(text: str) -> str:
    """Raises ValueError for half a character."""
    if HALF_CHARACTER.search(text):
        raise ValueError("one with half a character in it")
    return " ".join(text.split())


def _first(row: object, keys: Sequence[str]) -> str:
    """The value of the first of these keys. Raises ValueError when there is none, or no text."""
    found = [row[key] for key in keys if key in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str):
        raise ValueError(f"one without {', '.join(keys[:-1])} or {keys[-1]}")
    return found[0]


def _text(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    if b"\0" in data:  # UTF-16 without its mark: the upper half of a Latin letter is 0
        return data.decode("utf-16-be" if data[0::2].count(0) > data[1::2].count(0) else "utf-16-le")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")  # Latin-1 with the quotation marks of Windows


def _natural(name: str) -> tuple[object, ...]:
    """Sorts a2 before a10; digits by length, then as text, because int() refuses very long ones."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return (*((len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts)), name)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
