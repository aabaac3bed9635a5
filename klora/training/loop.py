"""One training for every family: encode the texts, drop their encoders, encode the images, drop the VAE, fit the LoRA.

Every random draw comes from a generator keyed by the seed and the number of the draw, so that a resumed run equals one
that was not stopped, and two processes equal one with twice the accumulation. Knows no Cog, no upload and no hub.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from klora.device import default_device, release
from klora.errors import RequestError
from klora.form.request import Request
from klora.interruptible import interruptible
from klora.lora import LoRA, LowRank, save_lora
from klora.models.family import Family
from klora.models.linears import linear_shapes
from klora.training.cache import Example, encode_pictures, encode_texts, keyed_generator, resolutions
from klora.training.config import TrainConfig
from klora.training.dataset import Picture, captioned
from klora.training.draw import Draw, Material
from klora.training.memory import check_precision, mode_for
from klora.training.objective import Objective, trainable_attention
from klora.training.run import Run, new_run, require_optimizer, saved_step
from klora.training.trainable import trainable
from klora.training.writing import RESUME_STATE, whole

logger = logging.getLogger(__name__)

Load = Callable[..., Family]
"""klora.models.load_model of one base: takes device, dtype, parts and quantized."""

MANY_PICTURES = 100  # to encode so many takes long enough that it is told how far that is
REPORTS = 100  # progress lines of a run, at most
MEASURES = 10  # fixed losses of a run, at most; each costs as much as three steps


@dataclass(frozen=True)
class Progress:
    """A report of a run. loss: the mean since the last report, None before the first step.   fixed_loss: the loss at
    Draw.fixed(), None where it was not measured; comparable over a run, as loss, of random noise levels, is not."""

    step: int
    steps: int
    loss: float | None = None
    fixed_loss: float | None = None
    learning_rate: float = 0.0
    steps_per_second: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """The rest of the steps by steps_per_second, which is measured since the last report, samples or checkpoint."""
        return (self.steps - self.step) / self.steps_per_second if self.steps_per_second else None

    def __str__(self) -> str:
        metrics = {"loss": self.loss, "fixed loss": self.fixed_loss, "it/s": self.steps_per_second}
        parts = [f"{name} {value:.4g}" for name, value in metrics.items() if value is not None]
        left = [f"{self.seconds_left:.0f} s left"] if self.seconds_left else []
        return ", ".join(parts + left)


OnProgress = Callable[[Progress], Any]
OnSaved = Callable[[int, LoRA], Any]
"""Takes the steps done, and the LoRA after them."""


def train_lora(
    load: Load,
    pictures: Sequence[Picture],
    config: TrainConfig,
    folder: Path,
    *,
    class_pictures: Callable[[], Sequence[Picture]] = tuple,
    resume: Path | None = None,
    on_progress: OnProgress = lambda progress: None,
    on_saved: OnSaved = lambda step, lora: None,
) -> LoRA:
    """Fit a LoRA to pictures. Raises RequestError.

    folder: gets samples/ and checkpoints/ on the way, and run.safetensors, the state of the run: at checkpoints, before
    samples, at the end, and, if it is new and finite, when an exception ends the loop.   resume: such a file to go on
    from.   on_saved: called each time that file is written.   class_pictures: makes the pictures for prior
    preservation, [] for none; called when nothing can be refused any more.
    """
    require_optimizer(config)
    if resume and (done := saved_step(resume)) >= config.steps:
        raise RequestError(f"steps is {config.steps}, and resume_from has done {done}. Expected more.")
    accelerator = Accelerator(mixed_precision="no", cpu=default_device().type == "cpu")
    check_precision(config, accelerator.device)
    bare = load(device=accelerator.device, parts=())
    shapes = linear_shapes(bare.denoiser)
    shapes = {name: shapes[name] for name in config.targets(shapes, bare.component)}
    rank = config.lora_rank or bare.recipe.rank
    material = encode(load, pictures, class_pictures, config, accelerator.device)
    mode = mode_for(bare, shapes, rank, material, config, accelerator.device)
    parts = ("denoiser", "vae")  # the VAE, for samples
    model = load(device=accelerator.device, dtype=mode.dtype, parts=parts, quantized=mode.quantized)
    layers = new_layers(shapes, rank, config.seed, accelerator.device)
    run = new_run(layers, config, model.recipe.learning_rate, (config.lora_alpha or rank) / rank)
    if resume:
        run.load(resume)
    denoiser: Any = model.denoiser.requires_grad_(False)
    if mode.checkpointing:
        denoiser.enable_gradient_checkpointing()
    with trainable_attention(), trainable(denoiser, layers) as gate:
        objective = Objective(model, gate.fill_(run.scale), config.snr_gamma, config.prior_loss_weight)
        if mode.compiled:
            denoiser.compile_repeated_blocks(dynamic=True)
        wrapped = accelerator.prepare(objective, device_placement=[False])
        draw = Draw(material, config, model.recipe.times, accelerator.device)
        _Loop(model, run, objective, wrapped, draw, config, accelerator, folder, on_saved, run.step).fit(on_progress)
    return run.lora()


def encode(
    load: Load,
    pictures: Sequence[Picture],
    class_pictures: Callable[[], Sequence[Picture]],
    config: TrainConfig,
    device: torch.device,
) -> Material:
    """Captions and pictures as the text encoders and the VAE encode them; each is dropped before the next is loaded.

    class_pictures: called when neither a caption nor a picture can be refused any more. Raises RequestError.
    """
    captions = [captioned(picture, config.trigger, config.prompt) for picture in pictures]
    kept_captions = [config.kept_caption(caption) for caption in captions if config.prior_preservation == "output"]
    kept_captions += [config.prior_prompt] if config.prior_preservation == "class_images" else []
    texts = encode_texts(load(device=device, parts=("text",)), [*captions, *kept_captions, *config.samples, ""])
    release(device)
    examples = _examples(load, pictures, captions, config, device)
    drawn = class_pictures()
    release(device)  # the base that drew them
    class_examples = _examples(load, drawn, [config.prior_prompt] * len(drawn), config, device) if drawn else ()
    return Material(examples, class_examples, texts)


def _examples(
    load: Load, pictures: Sequence[Picture], captions: Sequence[str], config: TrainConfig, device: torch.device
) -> tuple[Example, ...]:
    vae = load(device=device, dtype=torch.float32, parts=("vae",))  # SDXL's overflows in half precision
    examples, total = list[Example](), len(pictures) * len(resolutions(vae, config))
    for example in encode_pictures(vae, pictures, captions, config):
        examples.append(example)
        if len(examples) % max(MANY_PICTURES, total // 10) == 0:
            logger.info("encoded %d%% of the pictures", 100 * len(examples) // total)
    del vae
    release(device)
    return tuple(examples)


def new_layers(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device) -> dict[str, LowRank]:
    """Fresh float32 pairs for these layers: A ~ N(0, 1/rank²), as in the published recipe, and B = 0."""
    layers = {}
    for name, (outputs, inputs) in shapes.items():
        A = torch.randn(rank, inputs, generator=keyed_generator(seed, "A", name)) / rank
        layers[name] = LowRank(nn.Parameter(A.to(device)), nn.Parameter(torch.zeros(outputs, rank, device=device)))
    return layers


@dataclass
class _Loop:
    model: Family
    run: Run
    objective: Objective
    wrapped: Any  # the same, as accelerate wraps it
    draw: Draw
    config: TrainConfig
    accelerator: Accelerator
    folder: Path
    on_saved: OnSaved
    saved: int  # the step at which the run was last written, or began
    _losses: list[Tensor] = field(default_factory=list)

    def fit(self, on_progress: OnProgress) -> None:
        """Train to the last step; write the run at the end, and also when an exception ends it."""
        run, steps = self.run, self.config.steps
        if run.step == 0:
            on_progress(Progress(0, steps, fixed_loss=self._fixed_loss()))
        first, start = run.step, time.perf_counter()  # of the steps that are timed, without samples and the like
        try:
            while run.step < steps:
                self._losses.append(self._step())
                if due := _due(run.step, steps, REPORTS):
                    on_progress(self._progress(first, start))
                if self._write_due() or due:
                    first, start = run.step, time.perf_counter()
        except BaseException:
            interruptible(self._rescue)  # also from a second interruption
            raise
        self._save()

    def _rescue(self) -> None:
        if self.run.consistent and self.run.finite:
            self._save()

    def _step(self) -> Tensor:
        """Take one optimiser step; return the mean loss of this process's batches, []."""
        parts, processes = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        losses = []
        for part in range(parts):
            number = (self.run.step * parts + part) * processes + self.accelerator.process_index
            batch, prior = self.draw.batch(number), self.draw.class_batch(number)
            with nullcontext() if part == parts - 1 else self.accelerator.no_sync(self.wrapped):
                loss = self.wrapped(batch, prior) / parts
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        self.run.advance(self.config.max_grad_norm)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _fixed_loss(self) -> float:
        """The mean loss over Draw.fixed(), the batches that are the same at every step."""
        return float(torch.stack([self.objective(batch) for batch in self.draw.fixed()]).mean())

    def _progress(self, first: int, start: float) -> Progress:
        """The report of this step. first, start: after which step, and when, the timed steps began."""
        steps = self.config.steps
        loss = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean").item()  # waits for the device
        speed = (self.run.step - first) / (time.perf_counter() - start)
        self._losses.clear()
        if not math.isfinite(loss):
            raise RequestError(f"The loss is {loss} at step {self.run.step}. Expected a number: lower learning_rate.")
        measures = max(1, min(MEASURES, steps // 10))
        fixed_loss = self._fixed_loss() if _due(self.run.step, steps, measures) else None
        return Progress(self.run.step, steps, loss, fixed_loss, self.run.schedule.get_last_lr()[0], speed)

    def _write_due(self) -> bool:
        """Write samples and a checkpoint if they are due at this step, before them the run; return whether any were."""
        step, config = self.run.step, self.config
        last, main = step == config.steps, self.accelerator.is_main_process
        sampling = config.sample_steps and (last or (config.sample_interval and step % config.sample_interval == 0))
        saving = config.checkpoint_interval and step % config.checkpoint_interval == 0
        if not (sampling or saving):
            return False
        self._save()
        if main and saving:
            self._checkpoint()
        if main and sampling:
            self._sample()
        self.accelerator.wait_for_everyone()
        return True

    @torch.no_grad()
    def _sample(self) -> None:
        """Write an image of each sample prompt with the LoRA so far."""
        denoiser: Any = self.model.denoiser
        device_and_dtype = denoiser.device, denoiser.dtype
        with self.run.averaged():
            for number, prompt in enumerate(self.config.samples):
                request = Request(prompt, num_inference_steps=self.config.sample_steps, seed=self.config.seed)
                text = {name: part.to(*device_and_dtype) for name, part in self.draw.texts[prompt].items()}
                [image] = self.model.sample(text, request, lambda step: None)
                with whole(self.folder / "samples" / f"step_{self.run.step:06}_{number}.png") as part:
                    image.save(part, "PNG")

    def _save(self) -> None:
        """Write the run, unless it is written already. Raises RequestError, and writes nothing, if it is not finite."""
        step = self.run.step
        if step == self.saved:
            return
        if not self.run.finite:
            raise RequestError(f"What was learnt by step {step} is no number. Expected one: lower learning_rate.")
        if self.accelerator.is_main_process:
            self.run.save(self.folder / RESUME_STATE)
            self.on_saved(step, self.run.lora())
        self.saved = step

    def _checkpoint(self) -> None:
        """Write the LoRA so far, and remove all but the latest keep_checkpoints."""
        folder = self.folder / "checkpoints"
        with whole(folder / f"lora_{self.run.step:06}.safetensors") as part:
            save_lora(part, self.run.lora(), self.model.component, torch.float16)
        for old in sorted(folder.glob("lora_*.safetensors"))[: -self.config.keep_checkpoints]:
            old.unlink()


def _due(step: int, steps: int, times: int) -> bool:
    """Whether what is done so many times in a run, evenly and at the last step, is due at this one."""
    return step * times // steps > (step - 1) * times // steps
