"""What the README and the pages in docs/ show is what works."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import mypy.api
import numpy as np
import pytest
import torch

import predict
from klora import Request, generate, load_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def test_the_plug_in_lines_do_what_generate_does(
    bases: Path, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, role in (("dog", "content"), ("oil", "style")):
        (tmp_path / f"{name}.safetensors").write_bytes((loras / f"sdxl_{role}.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(bases / "sdxl")
    pipe.set_progress_bar_config(disable=True)
    # The lines draw from the global generator, ours from a seed: the same start is what makes them comparable.
    names: dict[str, Any] = {"pipe": Seeded(pipe, torch.Generator().manual_seed(3))}
    [lines] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(lines, names)

    model = load_model("sdxl", bases / "sdxl")
    request = Request("a sbu dog in szn style", num_inference_steps=30, guidance_scale=5.0, seed=3)
    content, style = (model.read_lora(tmp_path / f"{name}.safetensors") for name in ("dog", "oil"))
    [expected] = generate(model, request, content=content, style=style)
    # The pipeline decodes by its own path; one level of 255.
    assert np.abs(np.asarray(names["image"], dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_the_plug_in_lines_have_types(tmp_path: Path) -> None:
    """The package says that it is typed: what it shows is not to be refused by who checks that."""
    [lines] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "program.py").write_text("import diffusers\n\npipe: diffusers.StableDiffusionXLPipeline\n" + lines)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    said, _, status = mypy.api.run([*options, "--follow-imports", "silent", str(tmp_path / "program.py")])
    assert status == 0, said


OTHERS = {  # their inputs, as predict.py of replicate/cog-flux, lucataco/cog-flux-dev-lora, replicate/cog-sdxl has them
    "flux-dev-lora": """prompt aspect_ratio image prompt_strength num_outputs num_inference_steps guidance seed
        output_format output_quality disable_safety_checker go_fast megapixels lora_weights lora_scale extra_lora
        extra_lora_scale hf_api_token civitai_api_token""",
    "lucataco/flux-dev-lora": """prompt aspect_ratio image prompt_strength num_outputs num_inference_steps
        guidance_scale seed output_format output_quality disable_safety_checker hf_lora lora_scale""",
    "flux-fine-tuner": """prompt image mask aspect_ratio height width num_outputs lora_scale num_inference_steps model
        guidance_scale prompt_strength seed extra_lora extra_lora_scale megapixels replicate_weights go_fast
        disable_safety_checker output_format output_quality""",
    "cog-sdxl": """prompt negative_prompt image mask width height num_outputs scheduler num_inference_steps
        guidance_scale prompt_strength seed refine high_noise_frac refine_steps apply_watermark replicate_weights
        lora_scale disable_safety_checker""",
}


def test_of_other_models_inputs_those_that_are_not_taken_are_named() -> None:
    schema = json.loads((Path(__file__).parent / "golden" / "openapi_schema.json").read_text())
    taken = schema["components"]["schemas"]["Input"]["properties"].keys()
    lacking = {name for names in OTHERS.values() for name in names.split()} - taken
    said = re.search(r"cog-sdxl's ([^.]*?) have no\s+effect", README)
    assert said and {*re.findall(r"`(\w+)`", said[1])} == lacking
    for names, what in ((predict.ALIASES, "of our inputs"), (predict.OLD_MODELS, "of models")):
        told = re.search(
            r"(?:`\w+`[, ]*(?:and )?)+(?=(?:are accepted )?as old names " + what + ")", " ".join(README.split())
        )
        assert told and {*re.findall(r"`(\w+)`", told[0])} == {*names}


TRAINERS = """input_images trigger_word autocaption autocaption_prefix autocaption_suffix steps learning_rate batch_size
    resolution lora_rank caption_dropout_rate optimizer cache_latents_to_disk layers_to_optimize_regex
    gradient_checkpointing hf_repo_id hf_token wandb_api_key wandb_project wandb_run wandb_entity wandb_sample_interval
    wandb_sample_prompts wandb_save_interval skip_training_and_use_pretrained_hf_lora_url seed train_batch_size
    num_train_epochs max_train_steps is_lora unet_learning_rate ti_lr lora_lr lr_scheduler lr_warmup_steps token_string
    caption_prefix mask_target_prompts crop_based_on_salience use_face_detection_instead clipseg_temperature verbose
    checkpointing_steps input_images_filetype"""  # as train.py of replicate/flux-fine-tuner and of cog-sdxl name them


def test_of_other_trainers_inputs_those_that_are_not_taken_are_named_and_what_stands_for_them_is_taken() -> None:
    schema = json.loads((Path(__file__).parent / "golden" / "openapi_schema.json").read_text())
    taken = schema["components"]["schemas"]["TrainingInput"]["properties"].keys()
    page = (ROOT / "docs" / "training.md").read_text()
    section = page.split("## Coming from flux-fine-tuner or cog-sdxl\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ") and " | " in line]
    named, instead = ({*re.findall(r"`([a-z_]+)(?:=\w+)?`", text)} for text in (section, " ".join(r[1] for r in rows)))
    assert named - taken - {"auto", "on", "off"} == set(TRAINERS.split()) - taken
    assert instead <= taken and len(instead) == 12


class Seeded:
    """A pipeline that starts every call from one generator."""

    def __init__(self, pipe: Any, generator: Any) -> None:
        self._pipe, self._generator = pipe, generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._pipe(*args, **options, generator=[self._generator])


NAMED = re.compile(r"(?<![/\w])(?:script|klora|test_folder)/[\w./-]*\w|\b(?:predict|weights)\.py\b")


def test_every_file_and_script_that_a_page_names_exists() -> None:
    named = {name for text in PAGES.values() for name in NAMED.findall(text)}
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_link_of_a_page_leads_somewhere() -> None:
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert len(links) >= 8
    for page, link in links:
        file, _, heading = link.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists() and (not heading or heading in headings(linked)), (page.name, link)


def headings(page: Path) -> set[str]:
    """As GitHub names them in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
