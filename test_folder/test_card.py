"""The model card of a trained LoRA."""

import re
import sys
from unittest.mock import MagicMock

import huggingface_hub
import pytest

import weights
from klora.training import card

REPO = "someone/a-dog"
FACTS = {
    "lora_type": "subject", "trigger": "sbu", "prompt": "a sbu dog", "base": "sdxl", "rank": 8, "steps": 700,
    "repository": weights.BASES["sdxl"].repository, "learning_rate": 5e-5, "dataset": "5eed" * 16, "pictures": 5,
    "layers_to_optimize_regex": "to_q|to_k", "seed": 7, "batch_size": 2, "resolution": "512,768",
}  # fmt: skip


def read(base: str = "sdxl", samples: tuple[str, ...] = (), **facts: object) -> huggingface_hub.ModelCard:
    entry = weights.BASES[base]
    known = FACTS | {"base": base, "repository": entry.repository, "checkpoint": entry.checkpoint} | facts
    return huggingface_hub.ModelCard(card.model_card(known, entry.licence, samples))


def test_the_front_matter_says_what_the_lora_is_and_shows_its_samples() -> None:
    data = read().data
    assert (data.base_model, data.license, data.instance_prompt) == (FACTS["repository"], "openrail++", "a sbu dog")
    assert {"lora", "text-to-image", "diffusers", "k-lora", "sdxl", "dreambooth"} == set(data.tags)
    assert data.get("widget") is None and "<Gallery />" not in read().text
    shown = read(samples=("samples/1.png", "samples/2.png"))
    urls = [entry["output"]["url"] for entry in shown.data.widget]
    assert urls == ["samples/1.png", "samples/2.png"] and "<Gallery />" in shown.text


def test_the_licence_of_flux_dev_is_named_and_linked() -> None:
    flux = read("flux-dev")
    assert (flux.data.license, flux.data.license_name) == ("other", "flux-1-dev-non-commercial-license")
    assert flux.data.license_link == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert "FLUX.1 [dev] is non-commercial" in flux.text and "flux" in flux.data.tags
    assert "non-commercial" not in read().text and "non-commercial" not in read("flux-schnell").text
    assert (read("flux-schnell").data.license, read("illustrious-xl").data.license) == ("apache-2.0", "openrail++")


def test_a_licence_that_is_nobodys_known_one_leads_to_the_base() -> None:
    data = huggingface_hub.ModelCard(card.model_card(FACTS | {"repository": "a/base"}, "Our Own, v. 2")).data
    assert (data.license_name, data.license_link) == ("our-own-v-2", "https://huggingface.co/a/base")


@pytest.mark.parametrize(("kind", "role"), [("subject", "content_lora"), ("style", "style_lora")])
def test_the_use_in_klora_follows_the_kind(kind: str, role: str) -> None:
    text = read(lora_type=kind, trigger="zwx").text
    assert role in text and f"`zwx`: a {kind} LoRA" in text and "lora_kohya.safetensors" in text
    assert ({"content_lora", "style_lora"} - {role}).pop() not in text


def test_the_settings_are_a_table() -> None:
    table = dict(re.findall(r"^\| (\w+) \| `(.*)` \|$", read(snr_gamma=None, class_word="").text, re.MULTILINE))
    expected = {name: str(FACTS[name]).replace("|", r"\|") for name in FACTS.keys() & set(card.SETTINGS)}
    assert table == expected and len(table) == 10


def test_the_card_holds_no_caption_no_file_name_and_no_token() -> None:
    private = {
        "captions": ["my own child"],
        "hf_token": "hf_given",
        "files": "IMG_1.jpg",
        "sample_prompts": "my own child",
    }
    assert read(**private).content == read().content


@pytest.mark.parametrize("prompt", ["a sbu dog", "a \"sbu\" 'dog' `x` {y} | \\n", "a\n```\n---\nsbu: dog"])
def test_the_diffusers_code_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    text = read("flux-dev", prompt=prompt, hf_repo_id=REPO)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text.text, re.MULTILINE | re.DOTALL)
    monkeypatch.setitem(sys.modules, "diffusers", diffusers := MagicMock())
    exec(compile(code, "README.md", "exec"), {})
    loaded = diffusers.DiffusionPipeline.from_pretrained
    assert loaded.call_args.args == ("black-forest-labs/FLUX.1-dev",)
    assert str(loaded.call_args.kwargs["torch_dtype"]) == "torch.bfloat16"
    pipeline = loaded.return_value.to.return_value
    pipeline.load_lora_weights.assert_called_once_with(REPO, weight_name="lora.safetensors")
    assert pipeline.call_args.args == (text.data.instance_prompt,) == (" ".join(prompt.split()),)


def test_the_diffusers_code_loads_a_base_of_one_file_from_that_file() -> None:
    where = "https://huggingface.co/OnomaAIResearch/Illustrious-XL-v1.0/blob/main/Illustrious-XL-v1.0.safetensors"
    text = read("illustrious-xl").text
    assert "from diffusers import StableDiffusionXLPipeline\n" in text
    assert f'= StableDiffusionXLPipeline.from_single_file("{where}", torch_dtype=torch.float16)' in text
