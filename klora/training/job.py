"""A training from the upload to the tar of its results: what train.py and the `klora` command share.

Knows no form, no Cog and no environment.
"""

import dataclasses
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from klora import __version__
from klora.device import default_device
from klora.errors import KLoRAError, RequestError
from klora.form.request import Request
from klora.generation import generate
from klora.interruptible import interruptible
from klora.lora import LoRA, save_lora
from klora.models import FAMILIES, load_model
from klora.training.annotate import Captioner, Segmenter, autocaptioned, segmented
from klora.training.archive import Skipped
from klora.training.card import SETTINGS, model_card
from klora.training.config import TrainConfig
from klora.training.dataset import Picture, dataset_hash, read_upload
from klora.training.kohya import save_kohya
from klora.training.loop import Load, OnProgress, Progress, train_lora
from klora.training.memory import dtype_and_quantization
from klora.training.publishing import Publishing
from klora.training.sheet import sheet_of_samples
from klora.training.taken_up import FACTS, LOG, TakenUp, taken_up
from klora.training.writing import RESUME_STATE, require_place, tarred, whole, writing

logger = logging.getLogger(__name__)

NAMED = 20  # of the files that are left out for one reason, at most


@dataclass(frozen=True)
class TrainingBase:
    """The base model to train on. family: a key of FAMILIES; repository: where it comes from, on the hub.
    annotators: the folder that holds the folders captioner and segmenter, if they are installed; checkpoint: the file
    of the repository that the base is, if it is one."""

    name: str
    family: str
    path: Path
    repository: str
    licence: str
    annotators: Path
    checkpoint: str = ""


def run_training(
    base: TrainingBase,
    upload: Path,
    settings: Mapping[str, Any],
    out: Path,
    *,
    resume_from: Path | None = None,
    publishing: Publishing | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Path:
    """Train a LoRA and write a tar of all that comes of it to out. Raises KLoRAError.

    settings: TrainConfig's fields by name.   resume_from: such a tar, whose training goes on; it may be out itself.

    A training that fails or is stopped after it has saved its run still writes the tar, with the LoRA as saved last,
    and can be resumed from it. Before that, what is at out stays.
    """
    # Several processes, which `accelerate launch` starts, train together; the first one writes, logs and reports.
    state = PartialState(cpu=default_device().type == "cpu")
    publishing = publishing if publishing and state.is_main_process else Publishing()
    if state.is_main_process:
        require_place(out)
    with _scratch() as scratch:
        folder = scratch / "results"  # not where resume_from is unpacked, which is never handed back as a result
        try:
            resumed = taken_up(resume_from, scratch / "earlier") if resume_from else None
            config = resumed.config(settings) if resumed else TrainConfig(**settings)
            folder.mkdir()
            with publishing.tracked(config) as track:
                listeners: list[OnProgress] = [partial(_log, folder / LOG), on_progress, track]
                listeners = listeners if state.is_main_process else []
                _train(base, upload, config, folder, state, listeners, publishing, resumed)
            publishing.push(folder)
            return tarred(folder, out) if state.is_main_process else out
        except BaseException as error:
            if not state.is_main_process or not (folder / RESUME_STATE).is_file():
                raise
            notice = f"What was learnt is in {out}, which resume_from takes up."
            interruptible(partial(_save_tar, folder, out, notice))  # who cancels twice does not mean to lose it
            if isinstance(error, KLoRAError):
                raise type(error)(f"{error} {notice}") from error
            error.add_note(notice)
            raise


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, which is removed even where a second interruption comes meanwhile."""
    folder = tempfile.TemporaryDirectory(prefix="klora-train-")
    try:
        yield Path(folder.name)
    finally:
        interruptible(folder.cleanup)


def _save_tar(folder: Path, out: Path, notice: str) -> None:
    tarred(folder, out)
    logger.info("%s", notice)


def _train(
    base: TrainingBase,
    upload: Path,
    config: TrainConfig,
    folder: Path,
    state: PartialState,
    listeners: Sequence[OnProgress],
    publishing: Publishing,
    resumed: TakenUp | None,
) -> None:
    """Train, and write into the folder all that the tar will hold. resumed: the training that this one continues."""
    if state.num_processes > 1:
        [config] = broadcast_object_list([config])  # a seed that was chosen at random
    family = FAMILIES[base.family]
    pictures = _read_pictures(upload, config)
    facts = {
        "hf_repo_id": publishing.hf_repo_id,
        **dataclasses.asdict(config),
        "base": base.name,
        "family": family.name,
        "repository": base.repository,
        "checkpoint": base.checkpoint,
        "trigger": config.trigger,
        "prompt": config.prompt,
        "rank": config.lora_rank or family.recipe.rank,
        "learning_rate": config.rate(family.recipe.learning_rate),
        "pictures": len(pictures),
        "dataset": dataset_hash(pictures),
        "klora": __version__,
    }
    logger.info("%d pictures, seed %d", len(pictures), config.seed)
    for remark in config.remarks + publishing.remarks:
        logger.info("%s", remark)
    if resumed:
        resumed.check_same(facts)
        resumed.carry(config, folder)
    with writing():
        (folder / FACTS).write_text(json.dumps(facts, indent=2))
    if config.layers_to_optimize_regex:
        facts = {**facts, "lora_targets": ""}  # the expression took their place
    load: Load = partial(load_model, base.family, base.path)
    train_lora(
        load,
        _annotated(pictures, config, base.annotators, state.device),
        config,
        folder,
        class_pictures=lambda: _class_pictures(load, config, state.device),
        resume=resumed.state if resumed else None,
        on_progress=lambda progress: [listener(progress) for listener in listeners],
        on_saved=lambda step, lora: _write_lora(folder, lora, {**facts, "steps": step}, family.component),
    )
    if state.is_main_process:
        _write_card(folder, facts, base.licence, config)


def _read_pictures(upload: Path, config: TrainConfig) -> list[Picture]:
    """The upload's pictures, sorted by content: they are drawn by number, so that another order, as renamed files have,
    would be another training. Raises RequestError."""
    pictures, skipped = read_upload(upload)
    _log_skipped(skipped)
    if config.mask_mode == "provided":
        masks = sum(picture.mask is not None for picture in pictures)
        if not masks:
            raise RequestError(
                "mask_mode is provided, and no picture has a mask. Expected NAME.mask.png beside NAME.png."
            )
        logger.info("%d of %d pictures have a mask", masks, len(pictures))
    return sorted(pictures, key=lambda picture: picture.fingerprint)


def _log_skipped(skipped: Sequence[Skipped]) -> None:
    """A line for each reason: a Mac's zip has a hidden file for every picture."""
    reasons: dict[str, list[str]] = {}
    for item in skipped:
        reasons.setdefault(item.reason, []).append(item.name)
    for reason, names in reasons.items():
        more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
        each = "each " if len(names) > 1 else ""
        logger.info("skipped %s: %s%s", ", ".join(names[:NAMED] + more), each, reason)


def _write_lora(folder: Path, lora: LoRA, facts: Mapping[str, Any], component: str) -> None:
    """Write the LoRA in diffusers' format and in kohya's. facts: config.json's, with the steps done as steps."""
    names = ("base", "family", "repository", "trigger", "prompt", "klora", *SETTINGS)
    modules = hashlib.sha256("\n".join(sorted(lora)).encode()).hexdigest()
    metadata = {name: str(facts[name]) for name in names} | {"modules": str(len(lora)), "modules_sha256": modules}
    with whole(folder / "lora.safetensors") as part:
        save_lora(part, LoRA(lora.layers, metadata=metadata), component, torch.float16)
    with whole(folder / "lora_kohya.safetensors") as part:
        save_kohya(part, lora, component, metadata, torch.float16)


def _write_card(folder: Path, facts: Mapping[str, Any], licence: str, config: TrainConfig) -> None:
    last = sorted((folder / "samples").glob(f"step_{config.steps:06}_*.png"), key=lambda path: (len(path.name), path))
    card = model_card(facts, licence, [path.relative_to(folder).as_posix() for path in last])
    with writing():
        if last:
            sheet_of_samples(folder / "samples", config.samples).save(folder / "contact_sheet.png")
        (folder / "README.md").write_text(card, encoding="utf-8")


def _annotated(
    pictures: Sequence[Picture], config: TrainConfig, folder: Path, device: torch.device
) -> Sequence[Picture]:
    """The pictures with the captions and masks that the config has models make, for those that have none."""
    if config.autocaption and not (folder / "captioner" / "config.json").is_file():
        logger.info("autocaption is skipped: %s holds no captioning model", folder / "captioner")
    elif config.autocaption:
        captioner = Captioner.load(folder / "captioner", device)
        pictures = autocaptioned(pictures, captioner, config.autocaption_prefix, config.autocaption_suffix)
    if config.mask_mode == "clipseg":
        segmenter = Segmenter.load(folder / "segmenter", device)
        pictures = segmented(pictures, segmenter, config.mask_prompt or config.class_word)
    captioned = sum(picture.caption is not None for picture in pictures)
    logger.info("%d of %d pictures have a caption; one without is called %r", captioned, len(pictures), config.prompt)
    return pictures


def _class_pictures(load: Load, config: TrainConfig, device: torch.device) -> list[Picture]:
    """The pictures of the class that the base draws, if prior_preservation is class_images; else []."""
    if config.prior_preservation != "class_images":
        return []
    dtype, quantized = dtype_and_quantization(config.precision, device)
    model, drawn = load(device=device, dtype=dtype, quantized=quantized), list[Picture]()
    while len(drawn) < config.num_class_images:
        count = min(4, config.num_class_images - len(drawn))
        request = Request(config.prior_prompt, num_outputs=count, seed=(config.seed + len(drawn)) % (1 << 32))
        for image in generate(model, request):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            drawn.append(Picture(f"class_{len(drawn)}.png", buffer.getvalue(), None, None))
    logger.info("%d pictures of %r by the base", len(drawn), config.prior_prompt)
    return drawn


def _log(path: Path, progress: Progress) -> None:
    with writing(), path.open("a") as log:
        log.write(json.dumps(dataclasses.asdict(progress) | {"seconds_left": progress.seconds_left}) + "\n")
