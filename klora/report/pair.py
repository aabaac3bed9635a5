"""Two LoRA files -> a report, by a base that reads both, or by what the files themselves say where there is none."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klora.cache import Borrowed
from klora.errors import LoRAError
from klora.files.adapter import with_alphas
from klora.files.container import opened
from klora.files.factors import effective, modules, pairs
from klora.files.names import LayerKey, component
from klora.files.report import ENCODERS, stated_alphas
from klora.files.shelf import Shelf, keep_scores
from klora.form.pair import Question
from klora.fusion import Fusion, Schedule, fuse
from klora.interruptible import interruptible
from klora.lora import LoRA, LowRank
from klora.models import FAMILIES, load_shapes, origin_of
from klora.report import Report, report_on
from klora.report.numbers import Order

STEPS = 30  # where no base says what suits it


@dataclass(frozen=True)
class Pair:
    """A content and a style LoRA, and how they were read.  base: the one that read both, None where none could; steps:
    its default number; refusals: {base: why not}, of those that were tried before it."""

    content: LoRA
    style: LoRA
    base: str | None
    steps: int
    refusals: Mapping[str, str]

    @property
    def order(self) -> Order:
        """Only a base knows in which order its layers run."""
        return "file" if self.base is None else "execution"

    def __str__(self) -> str:
        """How they were read, in one line."""
        if self.base:
            return f"read as {self.base} reads them, layers in its execution order"
        why = "; ".join(f"{base}: {refusal}" for base, refusal in self.refusals.items())
        return f"read without a base, layers by name ({why or 'none of their family is installed'})"


def answer(
    question: Question, files: Mapping[str, Borrowed], bases: Mapping[str, tuple[str, Path]]
) -> tuple[Report, Pair]:
    """The report that a question asks for, and its pair. files: by input, "content_lora" and "style_lora".   bases:
    {name: (key of FAMILIES, folder)}. Raises KLoRAError."""
    schedule = Schedule.from_pattern(question.pattern, question.alpha, question.beta)
    pair = read_pair(files, bases)
    fusion = fused(pair, files)
    alphas = {name.removesuffix("_lora"): stated_alphas(file.path) for name, file in files.items()}
    steps = question.num_inference_steps or pair.steps
    return report_on(fusion, schedule, steps, question.style_bias, order=pair.order, alphas=alphas), pair


def fused(pair: Pair, files: Mapping[str, Borrowed]) -> Fusion:
    """Both LoRAs scored against each other. Scores are stored only where a base has read the pair: else layers are
    called as in the files."""
    fusion = fuse(pair.content, pair.style)
    for name, file in files.items() if pair.base else ():
        if file.scores:
            keep_scores(file.scores, pair.content if name == "content_lora" else pair.style)
    return fusion


def save_report(report: Report, folder: Path) -> list[Path]:
    """Write report.png and report.json, and return their paths."""
    from klora.report.picture import draw  # which loads matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / "report.png", folder / "report.json"
    # A library whose import is interrupted stays half imported, and draws nothing until the process ends.
    picture.write_bytes(interruptible(lambda: draw(report)))
    numbers.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    return [picture, numbers]


def read_pair(files: Mapping[str, Borrowed], bases: Mapping[str, tuple[str, Path]]) -> Pair:
    """Both files as the first base reads them that can read both. Where none can, as the files spell their layers,
    which they must do alike: then two LoRAs for any one model will do. Arguments as answer() has them. Raises
    LoRAError."""
    origins = {name: origin_of(file.path) for name, file in files.items()}
    content, style = origins["content_lora"], origins["style_lora"]
    if content and style and content.model != style.model:
        raise LoRAError(f"content_lora was made for {content} and style_lora for {style}. Expected two for one model.")
    family = next((origin.family for origin in (content, style) if origin), None)
    refusals: dict[str, str] = {}
    shelf = Shelf()
    for base, (kind, folder) in bases.items():
        if family not in (None, kind):
            continue
        model = load_shapes(kind, folder)
        try:
            read = {n: shelf.take(base, file.path, model.read_lora, file.scores) for n, file in files.items()}
        except LoRAError as error:
            refusals[base] = str(error)
        else:
            return Pair(read["content_lora"], read["style_lora"], base, model.steps, refusals)
    denoiser = FAMILIES[family].component if family else "unet"
    found = [_as_spelled(files[name].path, denoiser) for name in ("content_lora", "style_lora")]
    return Pair(*_alike(*found), None, STEPS, refusals)


def _as_spelled(path: Path, denoiser: str) -> dict[str, LowRank]:
    """The denoiser's pairs by their names in the file, without prefixes, sorted so that block 2 comes before block
    10."""
    with opened(path) as contents:
        factors, _ = pairs(contents, modules(effective(contents)))
        layers: dict[LayerKey, LowRank] = {}
        for stem, pair in factors.items():
            key = component(stem, [denoiser, *ENCODERS])
            if key in layers:
                raise LoRAError(f"adapts {key[1]!r} twice, once as {stem!r}. Expected one pair of factors a layer.")
            layers[key] = pair
        layers = with_alphas(layers, contents)
    return {name: layers[part, name] for part, name in sorted(layers, key=_by_number) if part == denoiser}


def _by_number(key: LayerKey) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", key[1])
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _alike(content: Mapping[str, LowRank], style: Mapping[str, LowRank]) -> tuple[LoRA, LoRA]:
    """Both LoRAs, style's layers called as content calls them where names differ in dots and underscores only. Raises
    LoRAError where they share no layer, or a shared one has two shapes."""
    names = {name.replace(".", "_"): name for name in content}
    style = {names.get(name.replace(".", "_"), name): pair for name, pair in style.items()}
    shared = content.keys() & style.keys()
    if content and style and not shared:
        raise LoRAError(
            f"content_lora adapts layers such as {next(iter(content))!r}, style_lora such as {next(iter(style))!r}: "
            "only a base can tell which is which. Expected KLORA_MODELS to hold one that reads both."
        )
    for name in sorted(shared):
        if (one := content[name].shape) != (other := style[name].shape):
            raise LoRAError(f"{name!r} is {one} in content_lora and {other} in style_lora. Expected one base.")
    return LoRA(content), LoRA(style)
