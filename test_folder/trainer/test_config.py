"""What a run is told: its defaults, the layers that presets name, and settings that make no sense."""

import re

import pytest

from klora import FAMILIES
from klora.errors import RequestError
from klora.models.linears import linear_shapes
from klora.training.config import TARGETS, TrainConfig, stripped
from test_folder import tiny


def test_presets_name_as_many_layers_as_published() -> None:
    unet, flux = (linear_shapes(build()) for build in (tiny.full_topology_unet, tiny.full_topology_flux))
    counted = {name: tuple(len(TrainConfig(lora_targets=name).targets(m)) for m in (unet, flux)) for name in TARGETS}
    assert counted["attention"] == (560, 190)
    assert counted["attention_qkv"] == (420, 171)
    assert counted["attention_mlp"] == (700, 342)
    assert counted["all"] == (700, 494)


def test_what_is_asked_for_and_does_not_come_about_is_said() -> None:
    given = {"autocaption_prefix": "a photo", "mask_prompt": "dog", "class_prompt": "a dog", "sample_prompts": "a dog"}
    assert TrainConfig(**given, mask_mode="provided", sample_steps=0).remarks == [
        "autocaption_prefix changes nothing: autocaption is False",
        "mask_prompt changes nothing: mask_mode is 'provided'",
        "class_prompt changes nothing: prior_preservation is 'none'",
        "sample_prompts changes nothing: sample_steps is 0",
    ]
    numbers = {"mask_min_weight": 0.0, "prior_loss_weight": 0.5, "num_class_images": 9, "sample_interval": 5}
    assert TrainConfig(**numbers, class_word="dog", keep_checkpoints=3, sample_steps=0).remarks == [
        "mask_min_weight changes nothing: mask_mode is 'none'",
        "prior_loss_weight changes nothing: prior_preservation is 'none'",
        "num_class_images changes nothing: prior_preservation is 'none'",
        "keep_checkpoints changes nothing: checkpoint_interval is 0",
        "sample_interval changes nothing: sample_steps is 0",
    ]
    [said] = TrainConfig(**numbers, class_word="dog", mask_mode="provided", prior_preservation="output").remarks
    assert said == "num_class_images changes nothing: prior_preservation is 'output'"
    acting = {"autocaption": True, "mask_mode": "clipseg", "prior_preservation": "output"}
    assert TrainConfig(**given, **acting, steps=9, lr_warmup_steps=8).remarks == TrainConfig().remarks == []
    for steps in (9, 10):
        [said] = TrainConfig(steps=steps, lr_warmup_steps=10).remarks
        assert said.startswith(f"lr_warmup_steps is 10 and steps {steps}: the learning rate is still rising at the end")
    [said] = TrainConfig(optimizer="prodigy", learning_rate=1e-4).remarks
    assert said.startswith("learning_rate is 0.0001 and optimizer prodigy, whose own rate hardly grows")
    assert TrainConfig(optimizer="prodigy").remarks == TrainConfig(optimizer="prodigy", learning_rate=0.5).remarks == []


def test_an_expression_takes_the_place_of_the_preset_and_must_name_a_layer() -> None:
    names = ["attn1.to_q", "ff.net.2"]
    assert TrainConfig(layers_to_optimize_regex="ff").targets(names) == ["ff.net.2"]
    with pytest.raises(RequestError) as refusal:
        TrainConfig(layers_to_optimize_regex="conv").targets(names)
    assert str(refusal.value) == (
        "layers_to_optimize_regex 'conv' names no linear layer of the base. Expected one such as attn1.to_q."
    )


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_an_expression_may_begin_with_the_denoisers_own_name(component: str) -> None:
    names = [f"single_transformer_blocks.{number}.proj_out" for number in (1, 7, 12, 17)]
    asked = TrainConfig(layers_to_optimize_regex=rf"{component}.single_transformer_blocks.(7|12|16|20).proj_out")
    assert asked.targets(names, component) == [names[1], names[2]]
    assert TrainConfig(layers_to_optimize_regex=r"^(?!single_transformer_blocks\.7)").targets(names) == [
        names[0], names[2], names[3],
    ]  # fmt: skip


def test_what_is_given_comes_before_what_is_made_of_it() -> None:
    given = TrainConfig(class_prompt="an old dog", prior_preservation="output")
    assert (given.prior_prompt, given.kept_caption("a sbu dog")) == ("an old dog", "an old dog")
    assert TrainConfig(class_word="dog").prior_prompt == "a dog"
    assert TrainConfig(mask_mode="clipseg", mask_prompt="a dog").class_word == ""
    rates = [TrainConfig(optimizer=name, learning_rate=rate).rate(5e-5)
             for name, rate in (("adamw", None), ("prodigy", None), ("prodigy", 0.5))]  # fmt: skip
    assert rates == [5e-5, 1.0, 0.5]
    assert TrainConfig(resolution="64,2048").sides == (64, 2048)


def test_the_published_recipe_is_the_default_on_sdxl() -> None:
    settings, recipe = TrainConfig(), FAMILIES["sdxl"].recipe
    assert (recipe.rank, recipe.learning_rate, settings.steps, settings.batch_size) == (8, 5e-5, 1000, 1)
    assert (settings.lr_scheduler, settings.prompt) == ("constant", "a sbu subject")
    assert TrainConfig(lora_type="style", class_word="cat").prompt == "a cat in szn style"


@pytest.mark.parametrize("kind", ["subject", "style"])
def test_samples_that_are_not_asked_for_are_four_of_the_trigger_and_the_class(kind: str) -> None:
    samples = TrainConfig(lora_type=kind, trigger_word="zwx", class_word="cat").samples
    assert len({*samples}) == 4 and all(re.search(r"\bzwx\b", sample) for sample in samples)
    assert samples[0] == TrainConfig(lora_type=kind, trigger_word="zwx", class_word="cat").prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", 1.5), ("steps", True), ("lora_rank", 129), ("learning_rate", -1.0),
     ("learning_rate", float("nan")),
     ("lora_type", "face"), ("lora_targets", "some"), ("resolution", "63"),
     ("resolution", "2049"), ("resolution", "big"), ("seed", None),
     ("layers_to_optimize_regex", "("), ("layers_to_optimize_regex", "a{9999999999}"),
     pytest.param("layers_to_optimize_regex", "(" * 5000, id="a deep expression"),
     ("lr_scheduler", "step"), ("mask_mode", "clipseg"), ("crop", "salience"),
     ("prior_preservation", "output"), ("trigger_word", 3), ("horizontal_flip", "yes"), ("instance_prompt", "a dog"),
     ("instance_prompt", "a sbuffer")],
)  # fmt: skip
def test_an_absurd_setting_is_refused_in_a_sentence(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^{field}.*(\. Expected .*|\. Give one)\.$|^{field} needs .*\.$"):
        TrainConfig(**{field: value})


def test_spaces_are_no_part_of_the_trigger_and_the_class_and_no_word_by_themselves() -> None:
    given = {"seed": 1, "instance_prompt": "a [trigger], a sbu dog"}
    assert TrainConfig(trigger_word=" sbu\n", class_word="dog ", **given) == TrainConfig(
        trigger_word="sbu", class_word="dog", **given
    )
    assert TrainConfig(trigger_word="  ", class_word=" ", seed=1) == TrainConfig(seed=1)
    assert TrainConfig(class_prompt=" ", mask_prompt="  ", seed=1) == TrainConfig(seed=1)
    assert stripped(absurd := {"trigger_word": 3, "class_word": None}) == absurd  # and refused later
    with pytest.raises(RequestError, match="neither is given"):
        TrainConfig(class_word=" ", prior_preservation="output")
    with pytest.raises(RequestError, match="neither is given"):
        TrainConfig(class_prompt=" ", prior_preservation="class_images")
