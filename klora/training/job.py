"""A training from an upload to the tar that it leaves: what train.py and the `klora` command share.

Knows no form, no Cog and no environment.
"""

import dataclasses
import hashlib
import io
import json
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors import SafetensorError

from klora import __version__
from klora.device import default_device
from klora.errors import RequestError
from klora.form.request import Request
from klora.generation import generate
from klora.lora import LoRA, save_lora
from klora.models import FAMILIES, load_model
from klora.training.annotate import Captioner, Segmenter, autocaptioned, segmented
from klora.training.card import RESUME_STATE, SETTINGS, contact_sheet, model_card
from klora.training.config import TrainConfig
from klora.training.dataset import Picture, dataset_hash, read_upload
from klora.training.kohya import save_kohya
from klora.training.loop import Load, OnProgress, Progress, train_lora
from klora.training.publishing import Publishing

logger = logging.getLogger(__name__)

LOG, FACTS = "train.jsonl", "config.json"
MAX_STATE_BYTES = 8 << 30
# What a run that is taken up again may be told anew; all else is as it was.
FREE = {"steps", "sample_prompts", "sample_interval", "sample_steps", "checkpoint_interval", "keep_checkpoints",
        "precision", "gradient_checkpointing", "compile"}  # fmt: skip


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
    given: Mapping[str, Any],
    out: Path,
    *,
    resume_from: Path | None = None,
    publishing: Publishing | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Path:
    """Train a LoRA and write a tar of all that comes of it to out. Raises KLoRAError.

    given: TrainConfig's fields.   resume_from: such a tar, whose training goes on.   An interruption leaves a tar, too,
    from which the training can go on, once a step is done.
    """
    # Several processes, which `accelerate launch` starts, train together; the first one writes and tells.
    state = PartialState(cpu=default_device().type == "cpu")
    publishing = publishing if publishing and state.is_main_process else Publishing()
    with tempfile.TemporaryDirectory(prefix="klora-train-") as name:
        folder = Path(name)
        try:
            config = _resumed(given, resume_from, folder) if resume_from else TrainConfig(**given)
            with publishing.tracked(config) as track:
                heard: list[OnProgress] = [partial(_log, folder / LOG), on_progress, track]
                heard = heard if state.is_main_process else []
                facts = {"hf_repo_id": publishing.hf_repo_id}
                _train(base, upload, config, folder, state, heard, facts, resuming=resume_from is not None)
            publishing.push(folder)
            return _tarred(folder, out) if state.is_main_process else out
        except (OSError, SafetensorError) as error:
            raise RequestError(
                f"The training could not be written: {error}. Expected more room on the disk."
            ) from error
        except BaseException as error:
            if state.is_main_process and (folder / RESUME_STATE).is_file() and not isinstance(error, Exception):
                _tarred(folder, out)
                logger.info("interrupted; resume_from=%s goes on from here", out)
            raise


def _train(
    base: TrainingBase,
    upload: Path,
    config: TrainConfig,
    folder: Path,
    state: PartialState,
    heard: Sequence[OnProgress],
    facts: Mapping[str, Any],
    *,
    resuming: bool,
) -> None:
    """Fill the folder. facts: what to say of the training besides what is found here."""
    if state.num_processes > 1:
        [config] = broadcast_object_list([config])  # a seed that was chosen at random
    family = FAMILIES[base.family]
    pictures, skipped = read_upload(upload)
    for item in skipped:
        logger.info("skipped %s: %s", item.name, item.reason)
    facts = {**facts, **dataclasses.asdict(config)} | {
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
    if resuming:
        _check_same(folder, facts)
    (folder / FACTS).write_text(json.dumps(facts, indent=2))
    load: Load = partial(load_model, base.family, base.path)
    lora = train_lora(
        load,
        _annotated(pictures, config, base.annotators, state.device),
        config,
        folder,
        class_pictures=lambda: _class_pictures(load, config, state.device),
        resume=folder / RESUME_STATE if resuming else None,
        on_progress=lambda progress: [listener(progress) for listener in heard],
    )
    if state.is_main_process:
        _write_results(folder, lora, facts, family.component, base.licence, config)


def _write_results(
    folder: Path, lora: LoRA, facts: Mapping[str, Any], component: str, licence: str, config: TrainConfig
) -> None:
    if config.layers_to_optimize_regex:
        facts = {**facts, "lora_targets": ""}  # the expression took their place
    kept = ("base", "family", "repository", "trigger", "prompt", "klora", *SETTINGS)
    modules = hashlib.sha256("\n".join(sorted(lora)).encode()).hexdigest()
    metadata = {name: str(facts[name]) for name in kept} | {"modules": str(len(lora)), "modules_sha256": modules}
    save_lora(folder / "lora.safetensors", LoRA(lora.layers, metadata=metadata), component, torch.float16)
    save_kohya(folder / "lora_kohya.safetensors", lora, component, metadata, torch.float16)
    last = sorted((folder / "samples").glob(f"step_{config.steps:06}_*.png"))
    if last:
        _sheet(folder / "samples", config).save(folder / "contact_sheet.png")
    card = model_card(facts, licence, [path.relative_to(folder).as_posix() for path in last])
    (folder / "README.md").write_text(card)


def _sheet(samples: Path, config: TrainConfig) -> Image.Image:
    """All samples: a row for each step that made some."""
    steps = sorted({path.stem.split("_")[1] for path in samples.glob("step_*.png")})
    rows = []
    for step in steps:
        paths = [samples / f"step_{step}_{number}.png" for number in range(len(config.samples))]
        rows.append((f"step {int(step)}", [Image.open(path) if path.is_file() else None for path in paths]))
    return contact_sheet(rows, config.samples)


def _annotated(
    pictures: Sequence[Picture], config: TrainConfig, folder: Path, device: torch.device
) -> Sequence[Picture]:
    """The pictures with the captions and masks that models make of them."""
    if config.autocaption and not (folder / "captioner" / "config.json").is_file():
        logger.info("autocaption is skipped: %s holds no captioning model", folder / "captioner")
    elif config.autocaption:
        captioner = Captioner.load(folder / "captioner", device)
        pictures = autocaptioned(pictures, captioner, config.autocaption_prefix, config.autocaption_suffix)
    if config.mask_mode == "clipseg":
        segmenter = Segmenter.load(folder / "segmenter", device)
        pictures = segmented(pictures, segmenter, config.mask_prompt or config.class_word)
    return pictures


def _class_pictures(load: Load, config: TrainConfig, device: torch.device) -> list[Picture]:
    """What the base draws of the class, to be kept."""
    if config.prior_preservation != "class_images":
        return []
    model, made = load(device=device), list[Picture]()
    while len(made) < config.num_class_images:
        count = min(4, config.num_class_images - len(made))
        request = Request(config.prior_prompt, num_outputs=count, seed=(config.seed + len(made)) % (1 << 32))
        for image in generate(model, request):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            made.append(Picture(f"class_{len(made)}.png", buffer.getvalue(), None, None))
    logger.info("%d pictures of %r by the base", len(made), config.prior_prompt)
    return made


def _log(path: Path, progress: Progress) -> None:
    with path.open("a") as log:
        log.write(json.dumps(dataclasses.asdict(progress) | {"seconds_left": progress.seconds_left}) + "\n")


def _resumed(given: Mapping[str, Any], tar: Path, folder: Path) -> TrainConfig:
    """The config of the training that a tar holds, and what it may be told anew; its state, in the folder."""
    _unpack(tar, folder)
    saved = json.loads((folder / FACTS).read_text())
    names = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    for name, value in given.items():
        if name not in FREE and value not in (saved[name], names[name]):
            raise RequestError(f"{name} is {value!r}, but resume_from was trained with {saved[name]!r}. Expected that.")
    anew = {name: value for name, value in given.items() if name in FREE}
    return TrainConfig(**{name: saved[name] for name in names} | anew)


def _unpack(tar: Path, folder: Path) -> None:
    wanted = {RESUME_STATE, FACTS, LOG}
    try:
        with tarfile.open(tar) as archive:
            members = [m for m in archive if m.name in wanted and m.isfile() and m.size <= MAX_STATE_BYTES]
            for member in members:
                with (folder / member.name).open("wb") as file:
                    shutil.copyfileobj(cast(IO[bytes], archive.extractfile(member)), file)
    except (tarfile.TarError, EOFError) as error:
        raise RequestError("resume_from cannot be read as a tar. Expected the tar of a training.") from error
    if lacking := wanted - {path.name for path in folder.iterdir()}:
        raise RequestError(f"resume_from holds no {min(lacking)}. Expected the tar of a training.")


def _check_same(folder: Path, facts: Mapping[str, Any]) -> None:
    before = json.loads((folder / FACTS).read_text())
    for name, what in (("base", "base_model"), ("dataset", "input_images")):
        if before[name] != facts[name]:
            raise RequestError(f"{what} is not what resume_from was trained on. Expected the same.")


def _tarred(folder: Path, path: Path) -> Path:
    """The folder in a tar, which appears whole."""
    part = path.with_suffix(".part")
    try:
        with tarfile.open(part, "w") as tar:
            for file in sorted(folder.rglob("*")):
                tar.add(file, file.relative_to(folder).as_posix(), recursive=False)
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)
