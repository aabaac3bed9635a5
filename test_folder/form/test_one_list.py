"""A request, the web form and the command have the same fields, and so have a training and its form."""

import inspect
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_type_hints

import cog
import pytest
import typer
from PIL import Image

import predict
import train
import weights
from klora import cli
from klora.errors import RequestError
from klora.form.request import MODELS, Request
from klora.training.config import TrainConfig
from klora.training.publishing import Publishing

FORM: Mapping[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(predict.Predictor.predict).parameters.items()
    if name != "self"
}
OPTIONS = {option.name: option for option in typer.main.get_command(cli.app).commands["fuse"].params}
OWN_DEFAULT = {"content_scale", "style_scale", "seed"}  # the form leaves them blank, so that an old name may fill them


def test_the_form_has_the_fields_of_a_request_in_its_order() -> None:
    others = {*predict.ALIASES, *predict.TOKENS, "prompts"}  # a file of requests
    ours = [name for name in FORM if name not in others]
    assert ours == [item.name for item in fields(Request)]


@pytest.mark.parametrize("name", [item.name for item in fields(Request)])
def test_the_form_has_a_requests_bounds_choices_default_and_type(name: str) -> None:
    item = next(item for item in fields(Request) if item.name == name)
    form, kind = FORM[name], get_type_hints(Request)[name]
    assert (form.ge, form.le) == (item.metadata.get("ge"), item.metadata.get("le"))
    old = [*predict.OLD_MODELS] if name == "model" else []
    assert form.choices == ([*item.metadata["choices"], *old] if "choices" in item.metadata else None)
    assert form.default == (None if name in OWN_DEFAULT or item.default is MISSING else item.default)
    kind = typing.Optional[kind] if name in OWN_DEFAULT else kind  # noqa: UP045
    form_kind = get_type_hints(predict.Predictor.predict)[name]
    assert form_kind == (cog.Path | None if kind == Image.Image | None else kind)


@pytest.mark.parametrize(("alias", "name"), predict.ALIASES.items())
def test_an_old_name_is_deprecated_and_bounded_as_the_new_one(alias: str, name: str) -> None:
    old, new = FORM[alias], FORM[name]
    assert (old.ge, old.le, old.choices, old.default, old.deprecated) == (new.ge, new.le, new.choices, None, True)
    hints = get_type_hints(predict.Predictor.predict)
    assert hints[alias] == hints[name]


@pytest.mark.parametrize("given", [("lora_weights", "content_lora"), ("lora_weights", "replicate_weights")])
def test_two_values_of_one_input_are_refused_by_its_names_alone(given: tuple[str, str]) -> None:
    """Links are keys."""
    values = {name: f"https://a.example/x?X-Amz-Signature=CANARY{place}" for place, name in enumerate(given)}
    with pytest.raises(RequestError, match="is an old name of content_lora") as error:
        predict._inputs({"prompt": "x"} | values)
    assert "CANARY" not in str(error.value) and str(error.value).split()[0] in given


def test_an_old_name_of_a_model_means_its_new_one() -> None:
    assert {*predict.OLD_MODELS.values()} < {*MODELS}
    for old, new in {**predict.OLD_MODELS, "sdxl": "sdxl"}.items():
        assert predict._inputs({"prompt": "x", "model": old})["model"] == new


def test_every_token_of_the_form_is_a_secret() -> None:
    hints = get_type_hints(predict.Predictor.predict)
    assert {name for name in FORM if hints[name] == cog.Secret | None} == set(predict.TOKENS)


def test_the_command_has_the_fields_of_a_request_in_its_order() -> None:
    assert [*OPTIONS] == [*(item.name for item in fields(Request)), "out"]


@pytest.mark.parametrize("name", [item.name for item in fields(Request)])
def test_the_command_has_a_requests_bounds_choices_and_default(name: str) -> None:
    item = next(item for item in fields(Request) if item.name == name)
    option = OPTIONS[name]
    if "ge" in item.metadata:
        assert (option.min, option.max) == (item.metadata["ge"], item.metadata["le"])
    if "choices" in item.metadata:
        assert get_args(option.type_descriptor.annotation) == item.metadata["choices"]
    assert option.default == (None if item.default is MISSING else item.default)
    assert option.help == item.metadata["help"]
    assert option.required == (name == "prompt")


TRAINING: Mapping[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(train.train).parameters.items()
}
SETTINGS = (*fields(TrainConfig), *fields(Publishing))


def test_the_command_trains_on_the_bases_of_the_training_form() -> None:
    options = {option.name: option for option in typer.main.get_command(cli.app).commands["train"].params}
    form, command = TRAINING["base_model"], options["base_model"]
    assert (tuple(form.choices), form.default) == (get_args(command.type_descriptor.annotation), command.default)
    assert set(form.choices) < {name for name, base in weights.BASES.items() if base.family}


def test_the_training_form_has_the_fields_of_a_training() -> None:
    others = {"input_images", "base_model", "resume_from"}
    assert [name for name in TRAINING if name not in others] == [item.name for item in SETTINGS]


@pytest.mark.parametrize("item", SETTINGS, ids=lambda item: item.name)
def test_the_training_form_has_a_trainings_bounds_choices_and_default(item: Field[Any]) -> None:
    form = TRAINING[item.name]
    assert (form.ge, form.le) == (item.metadata.get("ge"), item.metadata.get("le"))
    assert form.choices == (list(item.metadata["choices"]) if "choices" in item.metadata else None)
    assert form.default == (None if item.default is MISSING or item.default == "" else item.default)
