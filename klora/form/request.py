"""What a user may ask for: the form's fields, their bounds and what their absence means. Knows no Cog and no model.

predict.py repeats the names and bounds, because Cog reads its form from source text; a test holds the two together.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from PIL import Image

from klora.errors import RequestError
from klora.form.fields import MAX_SEED, ask, check, random_seed
from klora.form.pictures import MODES, flat

MODELS = ("sdxl", "illustrious-xl", "flux-dev", "flux-schnell")
FUSIONS = ("klora", "sum", "content", "style")
SCHEDULERS = ("DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL", "K_EULER", "PNDM")
ASPECT_RATIOS = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216),
    "4:5": (896, 1088), "5:4": (1088, 896), "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344),
    "9:21": (640, 1536),
}  # fmt: skip
"""Pixels at one megapixel, the sizes that FLUX on Replicate makes."""

CHOICE = ("pattern", "style_bias", "alpha", "beta")
"""Inputs of K-LoRA's choice, which mean nothing where it makes none."""


@dataclass(frozen=True)
class Request:
    """One request, checked on creation. None means a default that depends on the base or on other inputs.

    The names are the form's. Raises RequestError.
    """

    prompt: str = field(metadata={"help": "What the image shows, with the LoRAs' trigger words."})
    content_lora: str | None = ask(None, "LoRA of the subject.")
    style_lora: str | None = ask(None, "LoRA of the style.")
    model: str | None = ask(None, "Base model. Default: the one that the LoRAs were made for.", choices=MODELS)
    negative_prompt: str = ask("", "What the image should not show; SDXL only.")
    content_scale: float = ask(1.0, "Strength of the content LoRA where it acts; never changes where.", ge=-1, le=3)
    style_scale: float = ask(1.0, "Strength of the style LoRA where it acts; never changes where.", ge=-1, le=3)
    fusion: str = ask("klora", "K-LoRA, the sum of both LoRAs, or one of them alone.", choices=FUSIONS)
    pattern: str = ask(
        "auto", "s: content first, style last. s*: style, content, style. auto: s*.", choices=("auto", "s", "s*")
    )
    style_bias: float = ask(1.0, "Above 1 style acts in more layers and steps, below 1 in fewer.", ge=0, le=10)
    alpha: float | None = ask(None, "Slope of the schedule. Default: 1.5.", ge=0, le=10)
    beta: float | None = ask(None, "Start of the schedule. Default: 0.5 for s, 1.275 for s*.", ge=0, le=10)
    aspect_ratio: str | None = ask(
        None,
        "Shape of the image. Default: custom if width or height is given, else the input image's, else 1:1.",
        choices=(*ASPECT_RATIOS, "custom", "match_input_image"),
    )
    width: int | None = ask(None, "Width in pixels, for a custom aspect ratio.", ge=64, le=2048)
    height: int | None = ask(None, "Height in pixels, for a custom aspect ratio.", ge=64, le=2048)
    megapixels: str = ask("1", "Area of the image, as a share of the base's own.", choices=("0.25", "0.5", "1", "2"))
    image: Image.Image | None = ask(None, "Image to start from, cropped at its centre to the shape asked for.")
    mask: Image.Image | None = ask(
        None, "Where to repaint the image: white is repainted, black is kept, lighter greys mix both."
    )
    prompt_strength: float = ask(0.8, "How much of the input image is redrawn.", ge=0, le=1)
    num_outputs: int = ask(1, "Number of images.", ge=1, le=4)
    num_inference_steps: int | None = ask(None, "Denoising steps. Default: the base's own.", ge=1, le=500)
    guidance_scale: float | None = ask(None, "How closely to follow the prompt. Default: the base's own.", ge=0, le=50)
    scheduler: str | None = ask(None, "Noise schedule; SDXL only. Default: K_EULER.", choices=SCHEDULERS)
    seed: int = ask(random_seed, "Image i uses seed + i. Default: chosen at random.", ge=0, le=MAX_SEED)
    output_format: str = ask("webp", "File format.", choices=("webp", "jpg", "png"))
    output_quality: int = ask(80, "Quality of webp and jpg.", ge=0, le=100)
    add_triggers: bool = ask(
        True, "Add the trigger words that the LoRAs' files or pages name, if the prompt lacks them."
    )
    go_fast: bool = ask(
        False, "Faster, slightly different: FLUX skips what hardly changes between steps; compiled blocks run, if any."
    )
    disable_safety_checker: bool = ask(False, "Show images without checking them for unsafe content.")
    report: bool = ask(
        False, "Add report.png and report.json: which LoRA acts in which layer and step, and what would change that."
    )
    compare: bool = ask(False, "One sheet instead: content alone, style alone, their sum, K-LoRA with s and with s*.")
    sweep: bool = ask(False, "One sheet instead: style_bias 0.5, 0.7, 1, 1.4 and 2.")

    def __post_init__(self) -> None:
        check(self)
        self._convert_pictures()
        if not self.prompt.strip():
            raise RequestError("prompt is empty. Expected what the image shows.")
        sized = self.width is not None or self.height is not None
        if sized and self.aspect_ratio not in (None, "custom"):
            raise RequestError(f"width or height is given with aspect_ratio {self.aspect_ratio}. Expected custom.")
        if self.aspect_ratio == "custom" and not sized:
            raise RequestError("aspect_ratio is custom but neither width nor height is given. Give one or both.")
        if self.aspect_ratio == "match_input_image" and self.image is None:
            raise RequestError("aspect_ratio is match_input_image but image is not given. Give it, or a ratio.")
        if self.mask is not None and self.image is None:
            raise RequestError("mask is given without image. Expected the image to repaint, too.")
        if self.fusion != "klora":
            self.refuse_choice()
        self._check_views()

    def _convert_pictures(self) -> None:
        """To what pipelines take: they come in any mode that Pillow has. Those of open_image() stay as they are."""
        for name, mode in MODES.items():
            picture = getattr(self, name)
            if picture is not None and (picture.mode != mode or "icc_profile" in picture.info):
                object.__setattr__(self, name, flat(picture, mode))

    def check_roles(self, roles: Collection[str]) -> None:
        """Raise RequestError for what LoRAs of these roles alone, "content" and "style", cannot do."""
        if self.fusion in ("content", "style") and self.fusion not in roles:
            name = f"{self.fusion}_lora"
            raise RequestError(f"fusion is {self.fusion} but {name} is not given. Give it, or choose another fusion.")
        if self.fusion != "klora" or len(roles) < 2:
            self.refuse_choice()

    def refuse_choice(self) -> None:
        """Raise RequestError for an input of K-LoRA's choice that is given where it makes none."""
        self._require_defaults(CHOICE, "K-LoRA makes no choice without content_lora, style_lora and fusion klora")

    def without_choice(self, fusion: str) -> "Request":
        """The same by a fusion that makes none."""
        defaults: dict[str, Any] = {name: self.__dataclass_fields__[name].default for name in CHOICE}
        return replace(self, fusion=fusion, **defaults)

    def _require_defaults(self, names: Iterable[str], why: str) -> None:
        for name in names:
            if (seen := getattr(self, name)) != (default := self.__dataclass_fields__[name].default):
                raise RequestError(f"{name} is {seen} and {why}. Expected {'none' if default is None else default}.")

    def _check_views(self) -> None:
        views = [name for name in ("report", "compare", "sweep") if getattr(self, name)]
        if views and (len(self.loras) < 2 or self.fusion != "klora"):
            raise RequestError(f"{views[0]} shows K-LoRA's choice. Expected content_lora, style_lora and fusion klora.")
        set_here = {"compare": "pattern", "sweep": "style_bias"}
        for sheet in self.sheets:
            self._require_defaults((set_here[sheet], "num_outputs"), f"{sheet} is asked for")

    @property
    def sheets(self) -> tuple[str, ...]:
        """The contact sheets that are asked for instead of single images."""
        return tuple(name for name in ("compare", "sweep") if getattr(self, name))

    @property
    def changed(self) -> dict[str, Any]:
        """The inputs that differ from their defaults, by name; the seed, which has none, is one of them."""
        given = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        return {name: value for name, (value, default) in given.items() if value != default}

    def remarks(self, roles: Collection[str]) -> list[str]:
        """What is asked for and changes nothing with LoRAs of these roles alone and the other inputs, a sentence
        each."""
        changed, acting = self.changed, [role for role in roles if self.fusion in (role, "klora", "sum")]
        why = {f"{role}_scale": f"no {role} LoRA acts" for role in ("content", "style") if role not in acting}
        if self.image is None:
            why["prompt_strength"] = "there is no image to start from"
        if self.width is not None or self.height is not None:
            why["megapixels"] = "width or height is given"
        if self.output_format == "png":
            why["output_quality"] = "png is exact"
        return [f"{name} changes nothing: {reason}" for name, reason in why.items() if name in changed]

    @property
    def loras(self) -> dict[str, str]:
        """The LoRA references that were given, by input."""
        named = {"content_lora": self.content_lora, "style_lora": self.style_lora}
        return {name: reference for name, reference in named.items() if reference}

    @property
    def roles(self) -> tuple[str, ...]:
        """What the LoRAs are for that were given, "content" and "style"."""
        return tuple(name.removesuffix("_lora") for name in self.loras)

    def size(self, native: int, multiple: int) -> tuple[int, int]:
        """(width, height) in pixels on a base of this native side, in multiples of `multiple` unless named outright."""
        if self.width is not None or self.height is not None:
            return self.width or native, self.height or native
        if self.image is not None and self.aspect_ratio in (None, "match_input_image"):
            stretch = math.sqrt(self.image.width / self.image.height)
            if not 1 / 2 <= stretch <= 2:
                raise RequestError(
                    f"image is {self.image.width}x{self.image.height}. Expected sides of at most 4 to 1."
                )
            sides = native * stretch, native / stretch
        else:
            width, height = ASPECT_RATIOS[self.aspect_ratio or "1:1"]
            sides = width * native / 1024, height * native / 1024
        zoom = math.sqrt(float(self.megapixels)) / multiple
        return max(1, round(sides[0] * zoom)) * multiple, max(1, round(sides[1] * zoom)) * multiple

    def pixels(self, native: int, multiple: int) -> int:
        """Of an image of this size()."""
        return math.prod(self.size(native, multiple))
