"""LoRAs as data: LowRank is one layer's update, LoRA a file's, Plan which LoRA acts in which layer and step. Writes
diffusers' file format, too. Knows nothing of fusion, of pipelines or of reading (klora.files).

Shapes: O outputs, I inputs, R rank, T steps, L layers, N tokens, D width of an embedding.
"""

import os
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PLACED_BYTES = 1 << 29  # of the copy on a base's device that a LoRA keeps, at most: rank 48 on all of FLUX.1
Placement = tuple[torch.device, torch.dtype]
Words = Mapping[str, Mapping[str, Tensor]]
"""{word of a prompt: {text encoder's component: its vectors [N, D]}}"""


@dataclass(frozen=True, eq=False)
class LowRank:
    """One layer's update dW = B A, with alpha/rank already folded into B.  A [R, I], B [O, R], same device."""

    A: Tensor
    B: Tensor

    # Cached, because a request looks these up for hundreds of pairs.

    @cached_property
    def rank(self) -> int:
        return self.A.shape[0]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I) of dW."""
        return self.B.shape[0], self.A.shape[1]

    @cached_property
    def numel(self) -> int:
        """Elements of dW."""
        return self.B.shape[0] * self.A.shape[1]

    @cached_property
    def placement(self) -> Placement | None:
        """The device and dtype of both factors; None where B is of another dtype than A."""
        return (self.A.device, self.A.dtype) if self.A.dtype == self.B.dtype else None

    @cached_property
    def readable(self) -> tuple[Tensor, Tensor]:
        """A and B as klora.kernels reads them: see readable()."""
        return readable(self.A), readable(self.B)


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous and aligned to 16 bytes, else a copy that is."""
    fits = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


GatedPairs = list[tuple[LowRank, float]]
"""What acts in one layer: (pair, gate) of each LoRA whose gate is not 0."""


@dataclass(frozen=True, eq=False)
class LoRA(Mapping[str, LowRank]):
    """A LoRA file as data. As a mapping it is {layer of the denoiser: LowRank}, in execution order.

    text_encoders: {component: {module name: LowRank}}.   words: embeddings that it teaches the text encoders.
    metadata: the file's own strings, never executed.   report: what reading the file found (klora.files.report).
    scores: {layer: {K: sum of its K largest |dW|}}, for each K that a fusion has needed; K = O * I is the sum of all.
    Never write to its factors: placed() caches copies of them, and scores are of what they were.
    """

    layers: Mapping[str, LowRank]
    text_encoders: Mapping[str, Mapping[str, LowRank]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Words = field(default_factory=dict)
    report: Any = None
    scores: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)
    _placed: dict[Placement, Mapping[str, LowRank]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> LowRank:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def items(self) -> ItemsView[str, LowRank]:
        return self.layers.items()  # faster than Mapping's own, which asks for each key again

    def __len__(self) -> int:
        return len(self.layers)

    def placed(self, device: torch.device, dtype: torch.dtype) -> Mapping[str, LowRank]:
        """The denoiser's layers on a device, in a dtype. The last copy is kept, unless it exceeds PLACED_BYTES, so that
        a request which only changes a scale moves nothing."""
        if (device, dtype) not in self._placed:
            self._placed.clear()
            layers = _moved(self.layers, device, dtype)
            if sum(pair.A.nbytes + pair.B.nbytes for pair in layers.values()) > PLACED_BYTES:
                return layers
            self._placed[device, dtype] = layers
        return self._placed[device, dtype]

    def to(self, device: torch.device) -> "LoRA":
        """A copy with its factors on a device. Both share one dict of scores, which are those of the same numbers."""
        encoders = {name: _moved(layers, device) for name, layers in self.text_encoders.items()}
        return replace(self, layers=_moved(self.layers, device), text_encoders=encoders)


def _moved(layers: Mapping[str, LowRank], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, LowRank]:
    return {name: LowRank(pair.A.to(device, dtype), pair.B.to(device, dtype)) for name, pair in layers.items()}


class Step(int):
    """The index of a denoising step, from 0. steps: how many there are."""

    steps: int

    def __new__(cls, index: int, steps: int) -> "Step":
        step = super().__new__(cls, index)
        step.steps = steps
        return step

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]  # for copies, also in another process
        return int(self), self.steps


@dataclass(frozen=True, eq=False)
class Plan:
    """Which LoRA acts in which layer and step, and how strongly.

    layers: L names.   loras: {layer: LowRank} each, a layer may be missing.   gates: float [T, L, LoRAs], what each
    update is multiplied by, 0 where it does not act; T = 1 holds at every step.   content_wins: bool [T, L], True where
    content acts; None where K-LoRA had nothing to choose.
    """

    layers: tuple[str, ...]
    loras: tuple[Mapping[str, LowRank], ...]
    gates: Tensor
    content_wins: Tensor | None = None

    @classmethod
    def constant(cls, loras: tuple[Mapping[str, LowRank], ...], scales: tuple[float, ...]) -> "Plan":
        """Every LoRA acts at every step at its own scale: one LoRA alone, or a weighted sum."""
        layers = tuple(dict.fromkeys(name for lora in loras for name in lora))
        return cls(layers, loras, torch.tensor(scales, dtype=torch.float32).expand(1, len(layers), len(scales)))


def save_lora(path: Path | str, lora: LoRA, component: str, dtype: torch.dtype | None = None) -> Path:
    """Write a diffusers-format file that needs no alpha. component: what diffusers calls the denoiser, "unet" or
    "transformer"; dtype: None keeps each tensor's own. The words that the LoRA teaches are not in it."""
    tensors = {}
    for prefix, layers in {component: lora.layers, **lora.text_encoders}.items():
        for name, pair in layers.items():
            # Copies: layers that a file holds as one share a factor, which the library refuses to write twice.
            tensors[f"{prefix}.{name}.lora_A.weight"] = pair.A.to("cpu", dtype, copy=True).contiguous()
            tensors[f"{prefix}.{name}.lora_B.weight"] = pair.B.to("cpu", dtype, copy=True).contiguous()
    save_tensors(path, tensors, lora.metadata)
    return Path(path)


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file with the permissions of any new file: the library's own are the owner's alone."""
    save_file(dict(tensors), path, dict(metadata))
    os.umask(umask := os.umask(0o077))  # there is no other way to read it; what a thread makes meanwhile is closed
    Path(path).chmod(0o666 & ~umask)
