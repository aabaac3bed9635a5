"""What a family of base models is, and what families share: parts of a diffusers pipeline, and one call of it. Knows no
family by name.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from PIL import Image
from torch import Tensor, nn

from klora.errors import BaseModelError, RequestError
from klora.files.names import Inventory
from klora.form.request import Request
from klora.lora import LoRA
from klora.models.following import following
from klora.models.linears import execution_order, linear_shapes

Conditioning = Mapping[str, Tensor]
"""A prompt as the denoiser reads it, by the names of the diffusers pipeline's own arguments; batch first."""


Part = Literal["text", "vae", "denoiser"]
EVERY_PART: tuple[Part, ...] = ("text", "vae", "denoiser")
Quantized = Literal["int8", "nf4"]


class Posterior(NamedTuple):
    """What an image may be in latent space, as the denoiser scales it: mean and standard deviation [N, C, H/8, W/8]."""

    mean: Tensor
    std: Tensor


class Prediction(NamedTuple):
    """What the denoiser says of noised latents, and what it should say: float32 [N, C, H/8, W/8].

    snr [N]: signal to noise, the square of their scales' ratio.   gain [N]: the squared error of a prediction for each
    of the clean latents that it amounts to; snr where noise is predicted, more where a velocity is.
    """

    predicted: Tensor
    target: Tensor
    snr: Tensor
    gain: Tensor


class Recipe(NamedTuple):
    """What training takes when it is not told. times: the law of the noise levels, of klora.training.objective;
    resolutions: shares of the base's own side."""

    learning_rate: float
    rank: int
    times: str
    resolutions: tuple[float, ...]


class Compiled(NamedTuple):
    """Linears of compiled blocks, as go_fast lends LoRAs to them: klora.layers.attached() says how. None of them are
    alike where blocks have not been compiled with the gated engine's."""

    alike: tuple[str, ...] = ()
    float8: tuple[str, ...] = ()


class Family(Protocol):
    """A base model, loaded. No base class: whatever has these is a family."""

    name: ClassVar[str]
    component: ClassVar[str]  # what diffusers calls the denoiser
    schedulers: ClassVar[Mapping[str, Any]]  # Any: diffusers' scheduler classes share no typed base
    size_multiple: ClassVar[int]
    negative_prompts: ClassVar[bool]
    host_bound: ClassVar[bool]  # at 1024 px a GPU has run its kernels before the host has launched the next
    pipe: Any  # the diffusers pipeline that holds its parts
    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]  # by component, in the order of kohya's lora_te1_, lora_te2_
    native_size: int  # side in pixels of the square that the base was trained on
    steps: int  # and guidance_scale: what suits the base when a request does not say
    guidance_scale: float  # 0 of a base that takes none
    recipe: ClassVar[Recipe]
    compiled: Compiled | None  # what klora.models.compiling has compiled

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        parts: Collection[Part] = EVERY_PART,
        quantized: Quantized | None = None,
    ) -> "Family":
        """Read a base's folder; of parts not wanted only the shapes. quantized: the denoiser's weights."""

    @staticmethod
    def recognises(keys: list[str]) -> bool:
        """Whether a LoRA file with these tensor names was made for this family."""

    @property
    def inventory(self) -> Inventory:
        """What a LoRA may adapt. Found when it is first asked for."""

    def read_lora(self, path: Path | str) -> LoRA:
        """Read a LoRA file, its layers in execution order. Raises LoRAError."""

    def encode_prompt(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        """Conditioning of N prompts, and of what to steer away from."""

    def encode_images(self, pixels: Tensor) -> Posterior:
        """pixels [N, 3, H, W] in [-1, 1] -> the VAE's posterior. Deterministic: the mean is the image, sampling is the
        trainer's."""

    def predict(self, latents: Tensor, noise: Tensor, times: Tensor, conditioning: Conditioning) -> Prediction:
        """One call of the denoiser on latents mixed with noise, as in training. times [N] in [0, 1): 1 is all noise."""

    def sample(
        self, conditioning: Conditioning, request: Request, on_step: Callable[[int], Any], seeds: Sequence[int] = ()
    ) -> list[Image.Image]:
        """An image for each seed; without seeds, image i by request.seed + i. conditioning: of one prompt for all of
        them, or of as many. on_step(i) is called before the denoiser runs step i of the full schedule, 0-based, and
        with i = steps when denoising is over and decoding begins."""


def load_parts(
    kind: Any, path: Path, device: torch.device, parts: Collection[Part], checkpoint: Path | None = None, **options: Any
) -> Any:  # Any: a diffusers pipeline, class and instance
    """A diffusers pipeline with these parts on the device. Of a VAE or denoiser that is not wanted it has the shapes
    alone, on the meta device; of text encoders nothing.

    checkpoint: what checkpoint_in() has found, and then "dtype" among the options is {component: dtype}.
    """
    index = kind.load_config(path, local_files_only=True)
    components = {"text": ("text_encoder", "text_encoder_2"), "vae": ("vae",), "denoiser": ("unet", "transformer")}
    absent = {name for part in components.keys() - set(parts) for name in components[part] if name in index}
    bare = {name: None if name in components["text"] else _weightless(index[name][1], path / name) for name in absent}
    if checkpoint:
        pipe = _read_checkpoint(kind, checkpoint, bare, **options)
    else:
        pipe = kind.from_pretrained(path, **bare, **options, use_safetensors=True, local_files_only=True)
    for name, module in pipe.components.items():
        # What is quantised has been put on the device by its quantiser.
        if isinstance(module, nn.Module) and name not in absent and not getattr(module, "is_quantized", False):
            module.to(device)
    pipe.vae.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    pipe.vae.enable_slicing()  # one image at a time: less memory, and a batch decodes as its images alone would
    return pipe


def checkpoint_in(folder: Path) -> Path | None:
    """The file that holds the weights of all parts, under the names that the model's authors gave them: the only one
    at the top of a folder whose parts have none of their own."""
    files = list(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 and not any(folder.glob("*/*.safetensors")) else None


def _read_checkpoint(
    pipeline: Any, checkpoint: Path, given: Mapping[str, Any], dtype: Mapping[str, torch.dtype], **options: Any
) -> Any:  # Any: a diffusers pipeline
    """A pipeline whose parts, but for those given, come from one file, their configs from its folder. dtype: by
    component; "default": of the others.   Raises BaseModelError where the file lacks something."""
    local = {"config": str(checkpoint.parent), "local_files_only": True}
    index = pipeline.load_config(checkpoint.parent, local_files_only=True)
    lack = f"{checkpoint.name} lacks tensors of its parts. Fetch the base again."
    try:
        parts = {  # for the pipeline takes one dtype for all
            name: getattr(diffusers, index[name][1]).from_single_file(checkpoint, subfolder=name, dtype=kind, **local)
            for name, kind in dtype.items()
            if name not in ("default", *given)
        }
        pipe = pipeline.from_single_file(checkpoint, dtype=dtype["default"], **given, **parts, **options, **local)
    except (KeyError, NotImplementedError, SingleFileComponentError) as error:
        raise BaseModelError(lack) from error
    # What is lacking stays on the meta device, from where a diffusers model cannot be moved, but a text encoder can.
    if any(parameter.is_meta for encoder in encoders(pipe).values() for parameter in encoder.parameters()):
        raise BaseModelError(lack)
    return pipe


def _weightless(kind: str, folder: Path) -> Any:
    """A model of diffusers with its shapes alone, on the meta device."""
    model = getattr(diffusers, kind)
    with torch.device("meta"):
        return model.from_config(model.load_config(folder, local_files_only=True))


def weightless_encoders(pipeline: Any, path: Path) -> dict[str, nn.Module]:
    """A folder's text encoders with their shapes alone, on the meta device."""
    index, models = pipeline.load_config(path, local_files_only=True), dict[str, nn.Module]()
    for name in ("text_encoder", "text_encoder_2"):
        config = transformers.AutoConfig.from_pretrained(path / name, local_files_only=True)
        with torch.device("meta"):
            models[name] = getattr(transformers, index[name][1])(config)
    return models


def encoders(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders that a pipeline has, by component."""
    return {name: part for name in ("text_encoder", "text_encoder_2") if (part := getattr(pipe, name)) is not None}


def quantization(component: str, kind: Quantized | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained that quantise one component's weights. Raises ImportError without bitsandbytes."""
    if kind is None:
        return {}
    importlib.import_module("bitsandbytes")
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    backends = {"int8": ("bitsandbytes_8bit", {"load_in_8bit": True}), "nf4": ("bitsandbytes_4bit", four_bits)}
    return {"quantization_config": diffusers.PipelineQuantizationConfig(*backends[kind], [component])}


def denoise(
    pipe: Any,
    model: Family,
    conditioning: Conditioning,
    request: Request,
    on_step: Callable[[int], Any],
    seeds: Sequence[int],
    **options: Any,
) -> Tensor:
    """A diffusers pipeline's final latents, the seeds in one batch; what is left out is as of Family.sample. options:
    what this pipeline alone takes. Raises RequestError where they are no numbers: such an image would be black."""
    pipe.set_progress_bar_config(disable=True)
    steps = request.num_inference_steps or model.steps
    seeds = seeds or range(request.seed, request.seed + request.num_outputs)
    with following(pipe, on_step) as on_step_end:
        latents: Tensor = pipe(
            **conditioning,
            **options,
            num_inference_steps=steps,
            guidance_scale=model.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            num_images_per_prompt=len(seeds) // len(conditioning["prompt_embeds"]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step_end,
            output_type="latent",
        ).images
    on_step(steps)
    if not latents.isfinite().all():
        raise RequestError("The latents overflowed: the LoRAs are too strong for this base. Lower their scales.")
    return latents


def inventory_of(model: Family, inputs: Callable[[Any], Mapping[str, Any]]) -> Inventory:
    """What a LoRA may adapt: the linear layers of the denoiser, in execution order, and of the text encoders."""
    order = execution_order(model.denoiser, inputs)
    return {model.component: order} | {name: linear_shapes(part) for name, part in model.text_encoders.items()}


def word_widths(model: Any) -> dict[str, int]:  # Any: Family's nn.Module does not say that it has embeddings
    """The length of a token's vector, by text encoder."""
    return {name: encoder.get_input_embeddings().weight.shape[1] for name, encoder in model.text_encoders.items()}
