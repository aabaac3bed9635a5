"""Two LoRA files are matched layer by layer, with a base or by name, or refused in a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.cache import Borrowed
from klora.errors import LoRAError
from klora.files.report import stated_alphas
from klora.form.pair import Question
from klora.report.pair import answer, read_pair
from klora.report.picture import figure
from test_folder.pairs import pair_of


def kohya(source, target, alpha):
    """The same LoRA under kohya's names, alpha/rank left to the reader."""
    tensors = {}
    for key, tensor in load_file(source).items():
        stem, _, factor = key.removeprefix("unet.").removesuffix(".weight").rpartition(".lora_")
        stem = f"lora_unet_{stem.replace('.', '_')}"
        rank = tensor.shape[0 if factor == "A" else 1]
        tensors[f"{stem}.lora_{'down' if factor == 'A' else 'up'}.weight"] = (
            tensor if factor == "A" else tensor * rank / alpha
        )
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, target)
    return target


def base(bases, name="sdxl"):
    return {name: ("sdxl" if name == "sdxl" else "flux", bases / name)}


QUESTION = Question("content", "style")


@pytest.mark.parametrize(("family", "name", "steps"), [("sdxl", "sdxl", 30), ("flux", "flux-dev", 28)])
def test_with_a_base_its_order_and_its_steps_hold(bases, loras, family, name, steps):
    report, pair = answer(QUESTION, pair_of(loras, family), base(bases, name))
    assert (report.order, pair.base, report.steps) == ("execution", name, steps)
    assert report.layers == tuple(pair.content)
    assert "layers in its execution order" in str(pair)


def test_without_a_base_the_ratios_are_the_same_and_the_order_is_by_name(bases, loras, tmp_path):
    given = pair_of(loras)
    report, _ = answer(QUESTION, given, base(bases))
    given["content_lora"] = Borrowed(kohya(given["content_lora"].path, tmp_path / "kohya.safetensors", alpha=2))
    bare, pair = answer(QUESTION, given, {})
    assert (bare.order, pair.base, bare.alphas) == ("file", None, {"content": {2.0: len(bare.layers)}, "style": {}})
    flat = {name.replace(".", "_"): R for name, R in zip(report.layers, report.ratio.tolist(), strict=True)}
    spelled = {name.replace(".", "_"): R for name, R in zip(bare.layers, bare.ratio.tolist(), strict=True)}
    assert spelled == pytest.approx(flat, rel=1e-4)  # the means behind gamma are of other orders
    assert bare.to_json()["order"] == "file" and "by name" in figure(bare).axes[0].get_ylabel()
    assert "layers by name (none of their family is installed)" in str(pair)


def test_by_name_numbers_count_as_numbers(tmp_path):
    stems = [f"unet.mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in (10, 2, 1)]
    keys = {f"{stem}.lora_{factor}.weight": torch.randn(4, 4) for stem in stems for factor in "AB"}
    for role in ("content", "style"):
        save_file(keys, tmp_path / f"sdxl_{role}.safetensors")
    layers = list(read_pair(pair_of(tmp_path), {}).content)
    assert [name.split(".")[4] for name in layers] == ["1", "2", "10"]


def test_a_base_that_cannot_read_them_is_named(bases, tmp_path):
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for role in ("content", "style"):
        save_file({f"{stem}.lora_{f}.weight": torch.randn(7, 7) for f in "AB"}, tmp_path / f"sdxl_{role}.safetensors")
    _, pair = answer(QUESTION, pair_of(tmp_path), base(bases))
    assert pair.base is None and "layers by name (sdxl: sdxl_content.safetensors was made for another base" in str(pair)


def test_pairs_that_cannot_be_told_apart_or_matched_are_refused(loras, tmp_path):
    mixed = pair_of(loras) | {"style_lora": pair_of(loras, "flux")["style_lora"]}
    with pytest.raises(LoRAError, match=r"content_lora was made for SDXL and style_lora for FLUX\.1\. Expected two"):
        read_pair(mixed, {})
    names = {"content": "down_blocks.1.attentions.0.to_q", "style": "input_blocks.4.1.to_q"}
    for role, name in names.items():
        save_file({f"{name}.lora_{f}.weight": torch.randn(4, 4) for f in "AB"}, tmp_path / f"sdxl_{role}.safetensors")
    with pytest.raises(LoRAError, match=r"only a base can tell which is which\. Expected KLORA_MODELS"):
        read_pair(pair_of(tmp_path), {})
    narrow = {f"{names['content']}.lora_{f}.weight": torch.randn((4, 5) if f == "A" else (5, 4)) for f in "AB"}
    save_file(narrow, tmp_path / "sdxl_style.safetensors")
    with pytest.raises(LoRAError, match=r"is \(4, 4\) in content_lora and \(5, 5\) in style_lora\. Expected one base"):
        read_pair(pair_of(tmp_path), {})


def test_models_that_are_no_family_are_told_apart(tmp_path):
    for role, width in (("content", 768), ("style", 1024)):
        key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
        factors = {key.format("A"): torch.ones(1, width), key.format("B"): torch.ones(320, 1)}
        save_file(factors, tmp_path / f"sdxl_{role}.safetensors")
    with pytest.raises(LoRAError, match=r"^content_lora was made for SD 1\.5 .* and style_lora for SD 2 "):
        read_pair(pair_of(tmp_path), {})


@pytest.mark.parametrize("dotted", ["content", "style"])
def test_dots_and_underscores_spell_one_layer_which_has_content_s_name(tmp_path, dotted):
    stems = {role: "blocks.0.to_q" if role == dotted else "blocks_0_to_q" for role in ("content", "style")}
    for role, stem in stems.items():
        save_file({f"{stem}.lora_{f}.weight": torch.randn(4, 4) for f in "AB"}, tmp_path / f"sdxl_{role}.safetensors")
    pair = read_pair(pair_of(tmp_path), {})
    assert list(pair.content) == list(pair.style) == [stems["content"]]


@pytest.mark.parametrize("silent", ["content", "style"])
def test_a_file_that_tells_of_no_model_goes_with_any(loras, tmp_path, silent):
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    save_file({f"{stem}.lora_{f}.weight": torch.randn(4, 4) for f in "AB"}, tmp_path / "silent.safetensors")
    pair = read_pair(pair_of(loras) | {f"{silent}_lora": Borrowed(tmp_path / "silent.safetensors")}, {})
    assert [len(getattr(pair, role)) > 0 for role in ("content", "style")] == [silent == "style", silent == "content"]


def test_a_base_of_another_family_is_not_tried(bases, loras):
    pair = read_pair(pair_of(loras), base(bases, "flux-dev"))
    assert "layers by name (none of their family is installed)" in str(pair)


def test_without_a_base_the_denoiser_s_layers_alone_count_and_each_once(tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    stems = [f"unet.{layer}", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    keys = {f"{stem}.lora_{factor}.weight": torch.randn(4, 4) for stem in stems for factor in "AB"}
    for role in ("content", "style"):
        save_file(keys, tmp_path / f"sdxl_{role}.safetensors")
    files = pair_of(tmp_path, scores=tmp_path)
    report, _ = answer(QUESTION, files, {})
    assert report.layers == (layer,) and not any(file.scores.exists() for file in files.values())
    twice = keys | {f"{layer}.lora_{factor}.weight": torch.randn(4, 4) for factor in "AB"}
    save_file(twice, tmp_path / "sdxl_style.safetensors")
    with pytest.raises(LoRAError, match=f"adapts '{layer}' twice"):
        read_pair(pair_of(tmp_path), {})


def test_alphas_are_told_of_the_denoiser_alone(tmp_path):
    alphas = {"lora_unet_a.alpha": 8.0, "lora_unet_b.alpha": 4.0, "lora_unet_c.alpha": 8.0, "lora_te1_x.alpha": 1.0}
    save_file({key: torch.tensor(alpha) for key, alpha in alphas.items()}, tmp_path / "x.safetensors")
    assert stated_alphas(tmp_path / "x.safetensors") == {4.0: 1, 8.0: 2}


def test_alphas_that_metadata_states_are_applied_without_a_base(loras, tmp_path):
    given = pair_of(loras)
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    save_file(load_file(given["content_lora"].path), tmp_path / "stated.safetensors", said)
    plain, stated = (read_pair(given | {"content_lora": Borrowed(path)}, {}).content for path in (
        given["content_lora"].path, tmp_path / "stated.safetensors"))  # fmt: skip
    assert all(torch.allclose(stated[name].B, 2 * plain[name].B) for name in plain)  # rank 4


def test_scores_that_are_kept_are_not_computed_again(bases, loras, tmp_path, monkeypatch):
    files = pair_of(loras, scores=tmp_path)
    first, _ = answer(QUESTION, files, base(bases))

    def refused(*_):
        raise AssertionError("a product was computed")

    monkeypatch.setattr("klora.fusion.importance", refused)
    again, _ = answer(QUESTION, files, base(bases))
    assert again.to_json() == first.to_json()
