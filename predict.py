"""The web form and the HTTP inputs of K-LoRA, for Cog. What they mean is in klora.form; this file knows only Cog, which
reads the form from this source text, so that every string is one literal and every bound a number (script/schema).
"""

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path as LocalPath
from typing import Any, Optional

from cog import BasePredictor, Input, Path, Secret, current_scope
from PIL.Image import Image

import weights
from klora.bulk.batches import Bulk
from klora.bulk.folder import packed
from klora.bulk.lines import read_prompts
from klora.bulk.run import run
from klora.errors import RequestError
from klora.form.fields import random_seed
from klora.form.inputs import filled, progress_line, uploaded
from klora.form.pictures import open_images
from klora.form.request import Request
from klora.interruptible import patch_thread_start
from klora.models import silence_progress_bars
from klora.report.pair import save_report
from klora.studio import Check, Studio, save_images

MAX_LINES = 1000  # of prompts
ALIASES = {
    "lora_weights": "content_lora",
    "replicate_weights": "content_lora",
    "hf_lora": "content_lora",
    "lora_scale": "content_scale",
    "extra_lora": "style_lora",
    "extra_lora_scale": "style_scale",
    "guidance": "guidance_scale",
}
OLD_MODELS = {"dev": "flux-dev", "schnell": "flux-schnell"}
TOKENS = {"hf_api_token": "hf", "civitai_api_token": "civitai", "replicate_api_token": "replicate"}


class Predictor(BasePredictor):
    """Images by K-LoRA: a subject from one LoRA in the style of another."""

    def setup(self) -> None:
        """Load the bases named by KLORA_BASES, or every installed one, as many as fit."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        silence_progress_bars()
        patch_thread_start()
        self.scratch = tempfile.TemporaryDirectory(prefix="klora-")  # its own alone, and gone when the server is
        self.outputs = LocalPath(self.scratch.name, "outputs")
        self.studio = Studio(weights.find_base, weights.safety_checker_path(), compiled=weights.compiled_blocks())
        self.loras = weights.LoRAFiles(weights.lora_root())
        bases = weights.resident_bases()
        weights.stay_offline()  # all that a request loads is there; LoRAs are fetched without Hugging Face's libraries
        self.studio.prepare(bases)

    def predict(
        self,
        prompt: str = Input(
            description="What the image shows. Include the LoRAs' trigger words, unless their files name them."
        ),
        content_lora: Optional[str] = Input(
            description="LoRA of the subject: hf:owner/name, civitai:version, replicate:owner/name, a page or link of these, an https or data URI, or a file in the server's LoRA folder. Leave blank for none.",
            default=None,
        ),
        style_lora: Optional[str] = Input(
            description="LoRA of the style: hf:owner/name, civitai:version, replicate:owner/name, a page or link of these, an https or data URI, or a file in the server's LoRA folder. Leave blank for none.",
            default=None,
        ),
        model: Optional[str] = Input(
            description="Base model. Leave blank for the one that the LoRAs were made for. dev and schnell are old names of the FLUX.1 bases.",
            choices=["sdxl", "illustrious-xl", "flux-dev", "flux-schnell", "dev", "schnell"],
            default=None,
        ),
        negative_prompt: str = Input(description="What the image should not show. SDXL bases only.", default=""),
        content_scale: Optional[float] = Input(
            description="Strength of the content LoRA where it acts; never changes where it acts. Blank means 1.",
            ge=-1,
            le=3,
            default=None,
        ),
        style_scale: Optional[float] = Input(
            description="Strength of the style LoRA where it acts; never changes where it acts. Blank means 1.",
            ge=-1,
            le=3,
            default=None,
        ),
        fusion: str = Input(
            description="How the two LoRAs are combined: klora chooses one per layer and step, sum adds them, content and style use one alone.",
            choices=["klora", "sum", "content", "style"],
            default="klora",
        ),
        pattern: str = Input(
            description="Schedule of the choice. s: content first, style last. s*: style's palette first, then content, then style. auto is s*.",
            choices=["auto", "s", "s*"],
            default="auto",
        ),
        style_bias: float = Input(
            description="The slider between subject and style: above 1 the style acts in more layers and steps, below 1 in fewer.",
            ge=0,
            le=10,
            default=1.0,
        ),
        alpha: Optional[float] = Input(
            description="For experts: slope of the schedule. Blank means 1.5.", ge=0, le=10, default=None
        ),
        beta: Optional[float] = Input(
            description="For experts: start of the schedule. Blank means 0.5 for s and 1.275 for s*.",
            ge=0,
            le=10,
            default=None,
        ),
        aspect_ratio: Optional[str] = Input(
            description="Shape of the image. Blank means custom if width or height is given, else the input image's, else 1:1.",
            choices=[
                "1:1",
                "16:9",
                "21:9",
                "3:2",
                "2:3",
                "4:5",
                "5:4",
                "3:4",
                "4:3",
                "9:16",
                "9:21",
                "custom",
                "match_input_image",
            ],
            default=None,
        ),
        width: Optional[int] = Input(
            description="Width in pixels for a custom aspect ratio: a multiple of 8 on SDXL, of 16 on FLUX. Blank means the base's own.",
            ge=64,
            le=2048,
            default=None,
        ),
        height: Optional[int] = Input(
            description="Height in pixels for a custom aspect ratio: a multiple of 8 on SDXL, of 16 on FLUX. Blank means the base's own.",
            ge=64,
            le=2048,
            default=None,
        ),
        megapixels: str = Input(
            description="Area of the image in megapixels, unless width or height is given.",
            choices=["0.25", "0.5", "1", "2"],
            default="1",
        ),
        image: Optional[Path] = Input(
            description="Input image, cropped to the output shape. Blank: noise.", accept="image/*", default=None
        ),
        mask: Optional[Path] = Input(
            description="Where to repaint the image: white is repainted, black is kept, lighter greys mix both. Leave blank to redraw all of it.",
            accept="image/*",
            default=None,
        ),
        prompt_strength: float = Input(
            description="How much of the input image is redrawn: near 0 keeps it, 1 ignores it.",
            ge=0,
            le=1,
            default=0.8,
        ),
        num_outputs: int = Input(description="Number of images, made in one batch.", ge=1, le=4, default=1),
        num_inference_steps: Optional[int] = Input(
            description="Denoising steps. Blank means the base's own: 30 on SDXL, 28 on flux-dev, 4 on flux-schnell.",
            ge=1,
            le=500,
            default=None,
        ),
        guidance_scale: Optional[float] = Input(
            description="How closely to follow the prompt. Blank means the base's own: 7.5 on SDXL, 3.5 on flux-dev. flux-schnell takes none.",
            ge=0,
            le=50,
            default=None,
        ),
        scheduler: Optional[str] = Input(
            description="Noise schedule. SDXL bases only; blank means K_EULER.",
            choices=["DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM"],
            default=None,
        ),
        seed: Optional[int] = Input(
            description="Image i uses seed + i. Blank means a random one, which the log and the metrics report.",
            ge=0,
            le=4294967295,
            default=None,
        ),
        output_format: str = Input(
            description="File format of the images.", choices=["webp", "jpg", "png"], default="webp"
        ),
        output_quality: int = Input(
            description="Quality of webp and jpg images, from 0 to 100; png is always exact.", ge=0, le=100, default=80
        ),
        add_triggers: bool = Input(
            description="Add the trigger words that the LoRAs' files or pages name, if the prompt lacks them.",
            default=True,
        ),
        go_fast: bool = Input(
            description="Faster, with small, repeatable differences in the image: FLUX skips what hardly changes between steps, and compiled blocks run if the server has them. The metrics say which.",
            default=False,
        ),
        disable_safety_checker: bool = Input(
            description="Show the images without checking them for unsafe content.", default=False
        ),
        report: bool = Input(
            description="Add report.png and report.json to the outputs: which LoRA acts in which layer and step, and why.",
            default=False,
        ),
        compare: bool = Input(
            description="Make one sheet instead: content alone, style alone, their sum, K-LoRA with s and with s*. Costs up to five images.",
            default=False,
        ),
        sweep: bool = Input(
            description="Make one sheet instead: style_bias 0.5, 0.7, 1, 1.4 and 2. Costs up to five images.",
            default=False,
        ),
        prompts: Optional[Path] = Input(
            description="File of up to 1,000 lines, to make an image per line: each line is a prompt, or each a JSON object of inputs. Returns one tar of images and captions. Each prompt replaces {} in the prompt above.",
            default=None,
        ),
        hf_api_token: Optional[Secret] = Input(
            description="Hugging Face token for private or gated LoRAs. Used for this request alone.", default=None
        ),
        civitai_api_token: Optional[Secret] = Input(
            description="CivitAI token for LoRAs that need a login. Used for this request alone.", default=None
        ),
        replicate_api_token: Optional[Secret] = Input(
            description="Replicate token for private trainings. Used for this request alone.", default=None
        ),
        lora_weights: Optional[str] = Input(description="Old name of content_lora.", default=None, deprecated=True),
        lora_scale: Optional[float] = Input(
            description="Old name of content_scale.", ge=-1, le=3, default=None, deprecated=True
        ),
        extra_lora: Optional[str] = Input(description="Old name of style_lora.", default=None, deprecated=True),
        extra_lora_scale: Optional[float] = Input(
            description="Old name of style_scale.", ge=-1, le=3, default=None, deprecated=True
        ),
        replicate_weights: Optional[str] = Input(
            description="Old name of content_lora.", default=None, deprecated=True
        ),
        hf_lora: Optional[str] = Input(description="Old name of content_lora.", default=None, deprecated=True),
        guidance: Optional[float] = Input(
            description="Old name of guidance_scale.", ge=0, le=50, default=None, deprecated=True
        ),
    ) -> list[Path]:
        """Make the images."""
        given = {"prompt": prompt} | filled({name: value for name, value in locals().items() if name != "self"})
        shutil.rmtree(self.outputs, ignore_errors=True)  # Cog never deletes what it has sent
        started = time.perf_counter()
        if "prompts" in given:
            return [Path(self._make_lines(_inputs(given), _tokens(given)))]
        request, record = Request(**_inputs(given)), current_scope().record_metric
        record("seed", request.seed)
        print(f"seed {request.seed}")
        bases = weights.runnable(request.model)
        with self.loras.borrowed(request.loras, _tokens(given), bases) as files:
            record("fetch_seconds", time.perf_counter() - started)
            images = self.studio.make(request, files, record, lambda *at: print(progress_line(*at), flush=True))
            report = self.studio.report(request, files) if request.report else None
        paths = save_images(images, self.outputs, request) + (save_report(report, self.outputs) if report else [])
        return [Path(path) for path in paths]

    def _make_lines(self, inputs: dict[str, Any], tokens: dict[str, str]) -> LocalPath:
        """The tar of an image for each line of the prompts, by the other inputs."""
        lines, template, folder = inputs.pop("prompts"), inputs.pop("prompt"), self.outputs / "images"
        current_scope().record_metric("seed", seed := inputs.setdefault("seed", random_seed()))
        print(f"seed {seed}")
        allowance = weights.Allowance(weights.FETCH_SECONDS)

        def draw(requests: Sequence[Request], check: Check) -> dict[int, Image]:
            loras, bases = requests[0].loras, weights.runnable(requests[0].model)  # as those of all these requests
            with self.loras.borrowed(loras, tokens, bases, allowance) as files:
                return self.studio.draw(requests, files, check)

        prompts = read_prompts(lines, inputs, template=template, most=MAX_LINES, called="prompts")
        made = run(prompts, Bulk(on_error="skip"), folder, lambda: draw, lambda line: print(line, flush=True))
        return packed(folder, made.faults, self.outputs / "images.tar")


def _inputs(given: dict[str, Any]) -> dict[str, Any]:
    """A request's under their new names, its uploads opened, and "prompts" as it came."""
    inputs = {name: value for name, value in given.items() if name not in ALIASES and name not in TOKENS}
    for alias, name in ALIASES.items():
        if alias in given and given[alias] != inputs.setdefault(name, given[alias]):
            # Without the values: signed links are keys.
            raise RequestError(f"{alias} is an old name of {name}, of which another value is given, too. Give one.")
    if "model" in inputs:
        inputs["model"] = OLD_MODELS.get(inputs["model"], inputs["model"])
    uploads = {name: uploaded(name, inputs[name]) for name in ("image", "mask", "prompts") if name in inputs}
    return open_images(inputs | uploads)


def _tokens(given: dict[str, Any]) -> dict[str, str]:
    """The user's tokens, by authority."""
    return {authority: given[name].get_secret_value() for name, authority in TOKENS.items() if name in given}
