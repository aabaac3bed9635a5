"""What people may ask of a pair of LoRAs without an image: what they would do together, and one LoRA of both."""

import re
from dataclasses import dataclass, field
from typing import Any

from klora.errors import RequestError
from klora.form.fields import ask, check
from klora.form.request import Request


def _as_requested(name: str, **more: Any) -> Any:  # Any, as dataclasses.field itself is typed
    """A field of a request, with its bounds."""
    request_field = Request.__dataclass_fields__[name]
    return field(default=request_field.default, metadata={**request_field.metadata, **more})


@dataclass(frozen=True)
class Question:
    """What a report is asked of; the names and bounds are a request's. Raises RequestError."""

    content_lora: str = field(metadata={"help": "LoRA of the subject: a file, or a reference."})
    style_lora: str = field(metadata={"help": "LoRA of the style."})
    pattern: str = _as_requested("pattern")
    alpha: float | None = _as_requested("alpha")
    beta: float | None = _as_requested("beta")
    style_bias: float = _as_requested("style_bias")
    num_inference_steps: int | None = _as_requested("num_inference_steps", flags=("--num-inference-steps", "--steps"))

    def __post_init__(self) -> None:
        check(self)

    @property
    def loras(self) -> dict[str, str]:
        """Both references, by input."""
        return {"content_lora": self.content_lora, "style_lora": self.style_lora}


@dataclass(frozen=True)
class Export(Question):
    """What is to be baked of a pair; names and bounds are a request's where it has them. Raises RequestError."""

    num_inference_steps: int | None = _as_requested("num_inference_steps")
    content_scale: float = _as_requested("content_scale")
    style_scale: float = _as_requested("style_scale")
    steps: str | None = ask(None, "Steps to average, as A:B; 0:10 means the first ten. Default: all.")
    rank: int | None = ask(
        None, "Reduce layers to this rank. Default: keep the sum of both LoRAs' ranks.", ge=1, le=512
    )
    dtype: str = ask("fp16", "Data type of the weights in the file.", choices=("fp16", "bf16", "fp32"))
    format: str = ask("diffusers", "Naming of the layers in the file.", choices=("diffusers", "kohya"))

    @property
    def span(self) -> tuple[int, int] | None:
        """The steps, [first, last); None for all."""
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", self.steps or "")
        if self.steps is not None and not match:
            raise RequestError(f"steps is {self.steps!r}. Expected A:B, as in 0:10.")
        return (int(match[1]), int(match[2])) if match else None
