"""How an image was made: told in its file, and read back to make it again. Knows no pipeline and no form.

PNG has it in two text chunks: "klora" is the record, in JSON, and "parameters" the text that AUTOMATIC1111's web UI
began with and that viewers look for. JPEG and WebP have the record in XMP, and the parameters in EXIF's UserComment.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from klora import __version__
from klora.bases.table import BASES
from klora.errors import LoRAError, RequestError, SourceError
from klora.form.request import CHOICE, Request
from klora.fusion import Schedule
from klora.sources.kinds import Local
from klora.sources.reference import parse

logger = logging.getLogger(__name__)

FORM = 1  # of the record; to be raised when it can no longer be read as before
MAX_XMP_BYTES = 65_504  # of a JPEG, whose segments end there
MAX_COMMENT_BYTES = 60_000  # of the parameters in EXIF, which is one segment of a JPEG, too

Place = int | str
"""An image's, in its batch, counted from 0; a contact sheet's is its name."""

_LORAS = ("content_lora", "style_lora")
_PICTURES = ("image", "mask")
_INPUTS = {item.name for item in fields(Request)} - {*_LORAS, *_PICTURES}
_ALWAYS = {"prompt", "seed", "model", "num_inference_steps", "guidance_scale"}
_UNPRINTED = re.compile("[\ud800-\udfff\ufffe\uffff]")  # what UTF-8 or XML cannot hold, and JSON can escape
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:klora="urn:klora:"><klora:made>{}</klora:made></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True)
class UsedLoRA:
    """reference: canonical, without secrets.  sha256: of each file that it is read from, in hex.  trigger: the word
    that calls it, "" for none."""

    reference: str
    sha256: tuple[str, ...]
    trigger: str = ""


Check = Callable[[Mapping[str, UsedLoRA]], None]
"""Is shown the LoRAs, by input, before anything is drawn of them. Raises LoRAError for those that may not be used."""


@dataclass(frozen=True)
class Provenance:
    """All that it takes to make an image again, but for its LoRAs' files and the pictures that it was made from.

    inputs: those of the request that differ from their defaults and had an effect, with what the base settled.  place:
    in the batch, kept because products of a batch round differently; the image's seed is inputs["seed"] + place.
    loras: by input.  pictures: {input: picture_sha256}.  sources: {repository of the base: commit}, {} where klora has
    not fetched it.  measured: gamma and style_share, where K-LoRA chose.  versions: by library.
    """

    inputs: Mapping[str, Any]
    place: Place
    loras: Mapping[str, UsedLoRA]
    pictures: Mapping[str, str]
    sources: Mapping[str, str]
    measured: Mapping[str, float]
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls, request: Request, folder: Path, loras: Mapping[str, UsedLoRA], measured: Mapping[str, Any]
    ) -> "Provenance":
        """Of the first image of a batch. request: settled(); folder: its base's."""
        changed, effective = request.changed, _INPUTS - set(_idle(request, loras))
        return cls(
            {name: value for name, value in changed.items() if name in effective},
            0,
            loras,
            {name: picture_sha256(changed[name]) for name in _PICTURES if name in changed},
            sources_of(str(request.model), folder),
            {name: measured[name] for name in ("gamma", "style_share") if name in measured},
            versions(),
        )

    @property
    def seed(self) -> int:
        """Of this image."""
        return int(self.inputs["seed"]) + (self.place if isinstance(self.place, int) else 0)

    def record(self) -> str:
        """JSON, in characters that every format holds."""
        text = json.dumps({"klora": FORM, "seed": self.seed, **asdict(self)}, ensure_ascii=False)
        return _UNPRINTED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

    def parameters(self, size: tuple[int, int]) -> str:
        """For viewers: the prompts, and a line of "name: value" pairs. size: the image's, in pixels."""
        settings = {
            "Steps": self.inputs["num_inference_steps"],
            "Sampler": self.inputs.get("scheduler", "Euler"),
            "CFG scale": self.inputs["guidance_scale"],
            "Seed": self.seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": self.inputs["model"],
            **{f"{name.removesuffix('_lora').capitalize()} LoRA": lora.reference for name, lora in self.loras.items()},
            "Version": f"klora {self.versions['klora']}",
        }
        line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
        if self.loras:
            line += f", Hashes: {json.dumps(self._hashes())}"
        negative = self.inputs.get("negative_prompt")
        lines = [self.inputs["prompt"], *([f"Negative prompt: {negative}"] if negative else []), line]
        return "\n".join(lines).encode("utf-8", "replace").decode()

    def _hashes(self) -> dict[str, str]:
        """{"lora:NAME": first ten digits}, for CivitAI's readers. NAME: of its file, of two alike its reference."""
        used = self.loras.values()
        by_name = {PurePath(lora.reference).stem: lora for lora in used}
        if len(by_name) < len(used):
            by_name = {lora.reference: lora for lora in used}
        return {f"lora:{name}": lora.sha256[0][:10] for name, lora in by_name.items()}

    def request(self, **given: Any) -> Request:
        """The request of its batch. given: the input images, which no record holds, and references of LoRAs that are
        elsewhere now. Raises RequestError for one that is missing, another than it was, or was not used."""
        if unused := given.keys() - self.loras.keys() - self.pictures.keys():
            raise RequestError(f"{min(unused)} is given, but the image was made without one. Leave it out.")
        for name, pixels in self.pictures.items():
            if name not in given:
                raise RequestError(f"The image was made with {name} {pixels}, which is not in it. Give it by --{name}.")
            if (seen := picture_sha256(given[name])) != pixels:
                raise RequestError(f"{name} has pixels of sha256 {seen}. Expected those that were used, {pixels}.")
        for name, lora in self.loras.items():
            if name not in given and (why := _lost(lora.reference)):
                file = f"of sha256 {' and '.join(lora.sha256)}, by --{name.replace('_', '-')}"
                raise RequestError(f"{name} {why}. Give its file, {file}.")
        loras = {name: lora.reference for name, lora in self.loras.items()} | given
        chose = len(self.loras) == len(_LORAS) and self.inputs.get("fusion", "klora") == "klora"
        idle = () if chose else CHOICE  # recorded by earlier versions although without effect; this one refuses them
        return Request(**{name: value for name, value in self.inputs.items() if name not in idle}, **loras)

    def check(self, digests: Mapping[str, Sequence[str]]) -> None:
        """Raise LoRAError where a LoRA's files are not those that were used. digests: the files' sha256, by input."""
        for name, lora in self.loras.items():
            if set(digests[name]) != set(lora.sha256):
                raise LoRAError(
                    f"{name} has the sha256 {' and '.join(digests[name])}. Expected the LoRA that the image was made "
                    f"with, {' and '.join(lora.sha256)}."
                )

    def changes(self, folder: Path) -> list[str]:
        """In words, which libraries and which base have changed since. folder: the base's."""
        then = {**self.versions, **self.sources}
        now = {**versions(), **sources_of(self.inputs["model"], folder)}
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [f"{name} was {then.get(name, 'unknown')} and is {now.get(name, 'unknown')}" for name in names]


def settled(request: Request, model: str, steps: int, guidance_scale: float) -> Request:
    """The request with the defaults filled in that depend on the base, or on which LoRAs there are."""
    filled_in: dict[str, Any] = {"model": model, "num_inference_steps": steps}
    if request.guidance_scale is None:
        filled_in["guidance_scale"] = guidance_scale
    if request.fusion == "klora" and len(request.loras) == len(_LORAS) and not request.compare:  # which shows both
        schedule = Schedule.from_pattern(request.pattern, request.alpha, request.beta)
        filled_in |= {"pattern": schedule.pattern, "alpha": schedule.alpha, "beta": schedule.beta}
    return replace(request, **filled_in)


def _idle(request: Request, loras: Collection[str]) -> Iterator[str]:
    """Names of inputs that have no effect on this request. They are not refused: payloads of other models have them."""
    if request.image is None:
        yield "prompt_strength"
    for role in ("content", "style"):
        if f"{role}_lora" not in loras or request.fusion not in (role, "sum", "klora"):
            yield f"{role}_scale"


def canonical(reference: str, *, fetched: bool) -> str:
    """A reference without secrets: of a fetched file as klora.sources prints it; of a local one the path if it is below
    the working folder, else the name alone, for other folders are the machine's affair."""
    if fetched:
        return str(parse(reference))
    path = PurePath(reference.strip().partition("#sha256=")[0])
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def _lost(reference: str) -> str:
    """Why a canonical() reference cannot be fetched or opened here, as the rest of a sentence; "" where it may be."""
    if re.match("data:[0-9a-f]{64}(?:#|$)", reference):
        return "came in the request itself"
    with suppress(SourceError):  # of an odd name of a file
        if not isinstance(parse(reference), Local):
            return ""
    with suppress(OSError, ValueError):  # a name that the file system cannot take
        if Path(reference).exists():
            return ""
    return f"was {reference!r:.200}, which is not in the working folder"


def picture_sha256(picture: Image.Image) -> str:
    """Sha256 of an image's mode, size and pixels, in hex: the same whatever file they came in."""
    return sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


def sources_of(base: str, folder: Path) -> dict[str, str]:
    """{repository: commit} of an installed base; {} where klora has not fetched it."""
    try:
        commits = (folder / ".cache" / "klora" / "state").read_text().split()[:-1]
    except OSError:
        return {}
    return dict(zip((source.repository for source in BASES[base].sources), commits, strict=False))


@cache
def versions() -> Mapping[str, str]:
    """The versions of the libraries that decide an image's last bits, by name."""
    return {"klora": __version__, **{name: version(name) for name in ("torch", "diffusers", "transformers")}}


def stamp(provenance: Provenance, size: tuple[int, int], output_format: str) -> dict[str, Any]:
    """What Pillow's save() takes, so that the file tells how its image was made. size: the image's, in pixels.

    A prompt that is too long for EXIF is cut there, where people read it; the record is never cut. A JPEG that cannot
    hold it is saved without it, and the log says so.
    """
    record, parameters = provenance.record(), provenance.parameters(size)
    if output_format == "png":
        chunks = PngInfo()
        chunks.add_text("klora", record)
        chunks.add_text("parameters", parameters)
        return {"pnginfo": chunks}
    exif, xmp = Image.Exif(), _XMP.format(escape(record)).encode()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + _cut(parameters)
    if output_format == "jpg" and len(xmp) > MAX_XMP_BYTES:
        logger.warning("How the image was made takes %d bytes: a JPEG cannot hold it, png and webp can.", len(xmp))
        return {"exif": exif}
    return {"exif": exif, "xmp": xmp}


def read_provenance(file: Path) -> Provenance:
    """What an image says of how it was made. Raises RequestError where it says nothing, or not in this FORM."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            xmp = image.info.get("xmp", b"").decode("utf-8", "replace")
            record = image.info.get("klora") or unescape(xmp.partition("<klora:made>")[2].partition("</klora:made>")[0])
    except Exception as error:  # of a damaged file Pillow raises whatever it stumbles on
        raise RequestError(f"{file.name} cannot be read as an image. Expected a PNG, JPEG or WebP file.") from error
    if not record:
        raise RequestError(f"{file.name} does not say how it was made. Expected an image as klora has written it.")
    try:
        parts = json.loads(record)
        form, provenance = parts["klora"], _parsed(parts) if parts["klora"] == FORM else None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RequestError(
            f"{file.name} says how it was made in a record that is damaged. Expected klora's."
        ) from error
    if provenance is None:
        raise RequestError(
            f"{file.name} says how it was made in form {form!r:.20}. Expected {FORM}, which this klora reads."
        )
    return provenance


def _parsed(record: Mapping[str, Any]) -> Provenance:
    """The Provenance of a record from anyone's file: nothing in it is trusted. Raises ValueError and its like."""
    inputs, loras, pictures = (dict(record[name]) for name in ("inputs", "loras", "pictures"))
    if not (_ALWAYS <= inputs.keys() <= _INPUTS and loras.keys() <= {*_LORAS} and pictures.keys() <= {*_PICTURES}):
        raise ValueError("other inputs than there are")
    used = {n: UsedLoRA(str(x["reference"]), tuple(map(str, x["sha256"])), str(x["trigger"])) for n, x in loras.items()}
    plain = [{name: str(value) for name, value in record[part].items()} for part in ("sources", "versions")]
    place = record["place"] if record["place"] in ("compare", "sweep") else int(record["place"])
    return Provenance(inputs, place, used, pictures, plain[0], dict(record["measured"]), plain[1])


def _quoted(value: str) -> str:
    """The value, in quotes where it has a separator in it, as readers of the parameters expect."""
    return json.dumps(value, ensure_ascii=False) if re.search('[,:\n"]', value) else value


def _cut(parameters: str) -> bytes:
    """The parameters in UTF-16, big-endian as readers expect; the prompts' end is cut to fit MAX_COMMENT_BYTES."""
    head, newline, line = (part.encode("utf-16-be") for part in parameters.rpartition("\n"))
    most = max(0, MAX_COMMENT_BYTES - len(newline + line))
    kept = head[:most].decode("utf-16-be", "ignore").encode("utf-16-be")  # without half a character at its end
    return (kept + newline + line)[:MAX_COMMENT_BYTES]
