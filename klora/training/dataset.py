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
from klora.form.pictures import MAX_PIXELS, opaque, upright
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
        """Of image, caption and mask: equal where these three are, whatever the names."""
        return json.dumps([_sha256(self.data), self.caption, None if self.mask is None else _sha256(self.mask)])

    def open(self) -> Image.Image:
        """The picture as its maker saw it: RGB, turned as its EXIF says, over white, the first frame."""
        return _decoded(self.data, "white")

    def open_mask(self) -> Image.Image | None:
        """The mask, L, as large as the picture: white where it counts, black where the mask's file is transparent."""
        return None if self.mask is None else _decoded(self.mask, "black").convert("L")


def read_upload(path: Path, limits: Limits = Limits()) -> tuple[list[Picture], list[Skipped]]:  # noqa: B008  frozen
    """The pictures in the natural order of their names, and the files left out. Raises RequestError.

    A picture's caption is the first of: a .txt, .caption, .json or .cls beside it with its name or stem, a line of
    metadata.jsonl, a row of metadata.csv or *caption*.csv. Its mask is STEM.mask.png beside it, or a file with its
    stem in a folder masks/ there.
    """
    intake = unpack(path, limits)
    names = sorted(intake.files, key=_natural)
    sizes = _sizes([name for name in names if not _is_text(name)], intake)
    targets = {name: target for name in sizes if (target := _mask_target(name)) is not None}
    pictures = [name for name in sizes if name not in targets]
    captions = _captions([name for name in names if _is_text(name)], pictures, intake)
    masks = _masks(targets, sizes, intake)
    skipped = sorted(intake.skipped, key=lambda item: _natural(item.name))
    if not pictures:
        reasons = "; ".join([f"{intake.members} files seen", *(f"{item.name!r} {item.reason}" for item in skipped[:3])])
        raise RequestError(f"input_images has no usable picture: {reasons}. Expected {', '.join(FORMATS)} files.")
    return [Picture(name, intake.files[name], captions.get(name), masks.get(name)) for name in pictures], skipped


def dataset_hash(pictures: Iterable[Picture]) -> str:
    """SHA-256 over images, captions and masks; the same whatever their names and order."""
    return _sha256("\n".join(sorted(picture.fingerprint for picture in pictures)).encode())


def captioned(picture: Picture, trigger: str, template: str) -> str:
    """The text to train a picture with: its caption, with the trigger for [trigger] or else in front unless it is in it
    already; without a caption the template, with the trigger for [trigger]."""
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
    """{name: size} of the files that decode to the last row and are large enough; the others are skipped."""
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


def _mask_target(name: str) -> str | None:
    """The path without suffix of the picture that a mask of this name is for. None if it is no mask's name."""
    stem = posixpath.splitext(name)[0]
    if stem.lower().endswith(".mask"):
        return stem[: -len(".mask")]
    *folders, base = stem.split("/")
    if "masks" not in folders:
        return None
    at = folders.index("masks")
    return "/".join([*folders[:at], *folders[at + 1 :], base])


def _captions(texts: Sequence[str], pictures: Sequence[str], intake: Intake) -> dict[str, str]:
    """{picture: caption} by these text files; what cannot be used of them is skipped."""
    index = _index(pictures)
    captions: dict[str, str] = {}
    for name in sorted(texts, key=_precedence):
        try:
            entries = _entries(name, intake)
        except (ValueError, RecursionError, csv.Error) as error:
            intake.skip(name, f"cannot be read: {error}")
            continue
        for target, caption in entries:
            named = _lookup(index, target)
            if without := [picture for picture in named if picture not in captions]:
                captions |= dict.fromkeys(without, caption)
            else:
                intake.skip(name, f"has a caption for {target!r}, which {'has one' if named else 'is no picture here'}")
    return captions


def _masks(targets: Mapping[str, str], sizes: Mapping[str, Size], intake: Intake) -> dict[str, bytes]:
    """{picture: its mask's file}; masks that fit no picture are skipped. targets: {mask: path of its picture}."""
    index = _index([name for name in sizes if name not in targets])
    masks: dict[str, bytes] = {}
    for mask, target in targets.items():
        fitting = [name for name in _lookup(index, target) if sizes[name] == sizes[mask] and name not in masks]
        masks |= dict.fromkeys(fitting, intake.files[mask])
        if not fitting:
            size, *others = ("{}x{}".format(*sizes[name]) for name in (mask, *_lookup(index, target)))
            seen = f"of its name: {' and '.join(others) or 'none'}"
            intake.skip(mask, f"is a mask of {size}, and no picture of its name and size lacks one ({seen})")
    return masks


def _index(pictures: Sequence[str]) -> dict[str, list[str]]:
    """{key: pictures}. A picture's keys: its path, that without suffix, and "?" followed by either one casefolded."""
    index: dict[str, list[str]] = {}
    for name in pictures:
        stem = posixpath.splitext(name)[0]
        for key in {name, stem, f"?{name.casefold()}", f"?{stem.casefold()}"}:
            index.setdefault(key, []).append(name)
    return index


def _lookup(index: Mapping[str, list[str]], target: str) -> list[str]:
    """The pictures that a path names, with or without suffix; those of another case only if it names none exactly."""
    return index.get(target) or index.get(f"?{target.casefold()}") or []


def _precedence(name: str) -> tuple[int, str]:
    """Sorts the text files so that the first caption of a picture is the one that counts."""
    return (*SIDECARS, ".jsonl", ".csv").index(posixpath.splitext(name)[1].lower()), name


def _entries(name: str, intake: Intake) -> list[tuple[str, str]]:
    """(path of a picture with or without suffix, its caption) of each entry of a text file. Raises ValueError,
    RecursionError and csv.Error."""
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
    reader = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)  # else a quote after one opens nothing
    for keys in (FILE_KEYS, CAPTION_KEYS):
        if not set(keys).intersection(reader.fieldnames or ()):
            raise ValueError(f"its first line names no column {', '.join(keys[:-1])} or {keys[-1]}")
    return list(reader)


def _separator(text: str) -> str:
    """The separator of a CSV by its first line: spreadsheets write semicolons where decimals have commas."""
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _rows(name: str, rows: Sequence[object], intake: Intake) -> list[tuple[str, str]]:
    """(path of a picture, its caption) of each row that has a caption; rows that cannot be read are skipped one by one.
    Raises ValueError when none can be read."""
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
    entries = [(posixpath.normpath(posixpath.join(folder, file)), caption) for file, caption in pairs if caption]
    return [(unicodedata.normalize("NFC", file), caption) for file, caption in entries]


def _one_line(text: str) -> str:
    """The text with single spaces for all white space. Raises ValueError for half of a surrogate pair."""
    if HALF_CHARACTER.search(text):
        raise ValueError("one with half a character in it")
    return " ".join(text.split())


def _first(row: object, keys: Sequence[str]) -> str:
    """The value of the first of these keys that a row has. Raises ValueError when it has none or that is no text."""
    values = [row[key] for key in keys if key in row] if isinstance(row, dict) else []
    if not values or not isinstance(values[0], str):
        raise ValueError(f"one without {', '.join(keys[:-1])} or {keys[-1]}")
    return values[0]


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
