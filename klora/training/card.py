"""How a trained LoRA is presented: the contact sheet of its samples, the model card, the upload to the hub.

Works on pictures, facts and a folder, and knows nothing of torch, of Cog or of the training loop.
"""

import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public by its documentation
from PIL import Image, ImageDraw, ImageFont

from klora.errors import RequestError
from klora.training.writing import RESUME_STATE

# The contact sheet's measures in pixels: a picture's sides at least and at most, the height of letters (TEXT) and of
# lines (LEADING); and how many lines a text has at most.
LARGEST, SMALLEST, MARGIN, GAP, TEXT, LEADING, LABEL_WIDTH, LINES = 384, 192, 24, 16, 18, 23, 180, 3

SETTINGS = (
    "lora_type", "class_word", "rank", "lora_alpha", "lora_targets", "layers_to_optimize_regex", "steps", "optimizer",
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "weight_decay", "max_grad_norm", "batch_size",
    "gradient_accumulation_steps", "resolution", "crop", "horizontal_flip", "caption_dropout_rate", "mask_mode",
    "prior_preservation", "timestep_sampling", "snr_gamma", "noise_offset", "ema_decay", "precision", "seed",
    "pictures", "dataset",
)  # fmt: skip
"""The facts that a card lists; dataset is a SHA-256. Listed one by one, as others may hold captions or paths."""

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image | None]]], titles: Sequence[str]) -> Image.Image:
    """The sheet of rows (label, pictures), with a title above each column. A None leaves its cell empty."""
    font = ImageFont.load_default(TEXT)
    columns = max([len(titles), *(len(pictures) for _, pictures in rows)], default=0)
    grid = [[p and fitted(p) for p in [*pictures, *[None] * columns][:columns]] for _, pictures in rows]
    widths = [max([SMALLEST, *(picture.width for picture in column if picture)]) for column in zip(*grid, strict=True)]
    heights = [max([SMALLEST, *(picture.height for picture in row if picture)]) for row in grid]
    labels = [_wrapped(label, font, LABEL_WIDTH) for label, _ in rows]
    heads = [_wrapped(title, font, width) for title, width in zip(titles, widths, strict=False)]
    left = round(max((font.getlength(line) for label in labels for line in label), default=0))
    top = max(map(len, heads), default=0) * LEADING
    xs = list(accumulate((width + GAP for width in widths), initial=MARGIN + (left + GAP if left else 0)))
    ys = list(accumulate((height + GAP for height in heights), initial=MARGIN + (top + GAP // 2 if top else 0)))
    sheet = Image.new("RGB", (xs[-1] - GAP + MARGIN, ys[-1] - GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for head, x, width in zip(heads, xs, widths, strict=False):
        _write(draw, head, (x + width // 2, MARGIN + top - len(head) * LEADING), font, "ma")
    for label, row, y, height in zip(labels, grid, ys, heights, strict=False):
        _write(draw, label, (MARGIN, y + (height - len(label) * LEADING) // 2), font, "la")
        for picture, x, width in zip(row, xs, widths, strict=False):
            if picture:
                sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    return sheet


def fitted(picture: Image.Image) -> Image.Image:
    """A picture at its size on the sheet, RGB: a large one scaled to LARGEST, a small one by a whole factor to at least
    SMALLEST, so that its pixels stay squares."""
    side = max(picture.size)
    factor = -(-SMALLEST // side) if side <= LARGEST else LARGEST / side
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    resampling = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return picture.convert("RGB").resize(size, resampling)


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    """The text in at most LINES lines, each at most so many pixels wide; what is too long is cut, with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [*lines[: LINES - 1], " ".join(lines[LINES - 1 :])]
    return [_shortened(line, font, width) for line in kept if line]


def _shortened(line: str, font: _Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    end = bisect_left(range(len(line)), True, key=lambda end: font.getlength(f"{line[:end]}…") > width)
    return f"{line[: end - 1].rstrip()}…"


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: _Font, anchor: str) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * LEADING), line, "black", font, anchor)


def model_card(facts: Mapping[str, Any], licence: str, samples: Sequence[str] = ()) -> str:
    """The README.md. facts: config.json's content.  licence: the base's.  samples: pictures' paths in the folder."""
    repository, kind, prompt = facts["repository"], facts["lora_type"], " ".join(facts["prompt"].split())
    family = "flux" if "flux" in f"{facts['base']} {repository}".lower() else "sdxl"
    data = ModelCardData(
        base_model=repository, library_name="diffusers", pipeline_tag="text-to-image", instance_prompt=prompt,
        tags=["text-to-image", "diffusers", "lora", "k-lora", family, "dreambooth"],
        widget=[{"text": "-", "output": {"url": sample}} for sample in samples] or None,  # "-": the prompt is not told
        **_licence(repository, licence),
    )  # fmt: skip
    rows = {name: _code(facts[name]).replace("|", r"\|") for name in SETTINGS if facts.get(name) not in (None, "")}
    return f"---\n{data.to_yaml()}\n---\n\n" + _CARD.format(
        kind=kind, role="style_lora" if kind == "style" else "content_lora", trigger=_code(facts["trigger"]),
        prompt=_code(prompt), literal=repr(prompt), repository=repository, folder=facts.get("hf_repo_id") or ".",
        **_loading(repository, facts.get("checkpoint", ""), family),
        dtype="bfloat16" if family == "flux" else "float16", gallery="\n<Gallery />\n" if samples else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()), licence=licence,
        terms=f"{licence.split(' Non-')[0]} is non-commercial." if "Non-Commercial" in licence else "",
    )  # fmt: skip


_CARD = """# {trigger}: a {kind} LoRA for {repository}

A LoRA that stands for one {kind}, by the trigger word {trigger}. It was trained with DreamBooth, on pictures called
{prompt} or by captions of their own; the base did not change.
{gallery}
## In K-LoRA
Give `lora.safetensors` as `{role}`, a second LoRA as the other one, and a prompt with both trigger words.

## In diffusers
```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.{load}("{origin}", torch_dtype=torch.{dtype}).to("cuda")
pipeline.load_lora_weights("{folder}", weight_name="lora.safetensors")  # a folder, or a repository's id
pipeline({literal}).images[0].save("picture.png")
```

## In ComfyUI and A1111
Put `lora_kohya.safetensors`, the same weights under other names, into the folder of LoRAs; the prompt needs {trigger}.

## Settings
| Setting | Value |
| --- | --- |
{table}

## Limits
It works on its base and on models of the same architecture. It can draw what its pictures show beside the {kind}, and
the pictures themselves almost as they were. How well it does was not measured.

## Licence
The base, [{repository}](https://huggingface.co/{repository}), is under the {licence}, and so is this LoRA. {terms}
"""


def _loading(repository: str, checkpoint: str, family: str) -> dict[str, str]:
    """How diffusers loads the base: a folder by its index, one file by its address and a pipeline's name."""
    if not checkpoint:
        return {"pipeline": "DiffusionPipeline", "load": "from_pretrained", "origin": repository}
    pipeline = {"sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}[family]
    origin = f"https://huggingface.co/{repository}/blob/main/{checkpoint}"
    return {"pipeline": pipeline, "load": "from_single_file", "origin": origin}


def _licence(repository: str, licence: str) -> dict[str, Any]:
    """The card's licence fields: the hub's identifier, or for a licence without one its name and a link."""
    identifiers = {"rail++": "openrail++", "rail-m": "creativeml-openrail-m", "apache-2.0": "apache-2.0"}
    for part, identifier in identifiers.items():
        if part in licence.lower():
            return {"license": identifier}
    name, file = re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-"), "/blob/main/LICENSE.md"
    link = f"https://huggingface.co/{repository}{file if repository.startswith('black-forest-labs/') else ''}"
    return {"license": "other", "license_name": name, "license_link": link}


def _code(value: object) -> str:
    """The value as Markdown's code, on one line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def check_repo_id(repo_id: str) -> None:
    """Raise RequestError, before training starts, for a name that the hub would refuse."""
    try:
        validate_repo_id(repo_id if "/" in repo_id else "")
    except HFValidationError:
        seen = "a token" if repo_id.startswith("hf_") else repr(repo_id)  # pasted into the wrong field
        accepted = "owner/name, of letters, digits, '-', '_' and '.', at most 96 each, without '--' and '..'"
        raise RequestError(f"hf_repo_id is {seen}. Expected {accepted}.") from None


def push(folder: Path, repo_id: str, token: str, private: bool = True) -> str:
    """Upload a training's folder, without the state from which only its owner resumes; return the address. Raises
    RequestError.

    private: make the repository private, and refuse an existing one that is public.
    """
    api = HfApi(token=token)
    with _silenced():
        return _pushed(api, folder, repo_id, private)


@contextmanager
def _silenced() -> Iterator[None]:
    """In the block the hub's libraries log nothing: their lines show signed addresses, which give access."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx2", "httpcore2")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _pushed(api: HfApi, folder: Path, repo_id: str, private: bool) -> str:
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        # An existing repository stays as it is: create_repo does not make it private, nor raise.
        if private and not api.model_info(repo_id).private:
            seen = f"hf_repo_id is {repo_id!r}, which is public, and hf_private is true"
            raise RequestError(f"{seen}. Expected a private repository, or hf_private=false.")
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[RESUME_STATE, f"*/{RESUME_STATE}"])
    except RequestError:
        raise
    except Exception as error:  # a hub out of reach raises what its HTTP library raises, a portal a JSON error
        # Not chained: the hub may quote the token in what it answers, and logs show causes.
        raise RequestError(f"hf_repo_id is {repo_id!r}, but {_refusal(error)}") from None
    return str(address)


def _refusal(error: Exception) -> str:
    """What went wrong and what is expected, without what the error says."""
    if not isinstance(error, HfHubHTTPError):
        return f"the upload broke off ({type(error).__name__}). Expected a hub that can be reached and answers."
    accepted = {
        401: "a valid token with the right to write", 403: "a token with the right to write for this owner",
        404: "an owner for whom the token may write", 409: "a repository that nothing else changes meanwhile",
    }  # fmt: skip
    wanted = accepted.get(error.response.status_code, "a repository that takes the upload")
    return f"the hub refused it ({error.response.status_code}). Expected {wanted}."
