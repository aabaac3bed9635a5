"""The model card of a trained LoRA: what it is, how it is used and how it was made."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

SETTINGS = (
    "lora_type", "class_word", "rank", "lora_alpha", "lora_targets", "layers_to_optimize_regex", "steps", "optimizer",
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "weight_decay", "max_grad_norm", "batch_size",
    "gradient_accumulation_steps", "resolution", "crop", "horizontal_flip", "caption_dropout_rate", "mask_mode",
    "prior_preservation", "timestep_sampling", "snr_gamma", "noise_offset", "ema_decay", "precision", "seed",
    "pictures", "dataset",
)  # fmt: skip
"""The facts that a card lists; dataset is a SHA-256. Listed one by one, as others may hold captions or paths."""


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
