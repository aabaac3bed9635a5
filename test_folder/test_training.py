"""The trainer: what it learns, what it leaves alone, and that a run taken up again is the same run."""

import dataclasses
import io
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from klora import FAMILIES, LoRA, Request, generate, load_model, save_lora
from klora.errors import RequestError
from klora.layers import trainable
from klora.lora import Plan
from klora.models.family import Family, linear_shapes
from klora.training.config import TARGETS, TrainConfig
from klora.training.dataset import Picture
from klora.training.loop import new_layers, train_lora
from test_folder import tiny

BASES = {"sdxl": "sdxl", "flux": "flux-dev"}
QUICK = TrainConfig(steps=6, learning_rate=1e-3, lora_rank=4, resolutions=(64,), seed=3)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, bases: Path) -> Family:
    return load_model(request.param, bases / BASES[request.param], torch.device("cpu"))


@pytest.fixture
def pictures() -> list[Picture]:
    """Four colours in three shapes, two of them captioned."""
    made = []
    for index, (colour, size) in enumerate(
        [("red", (64, 64)), ("green", (96, 64)), ("blue", (64, 96)), ("white", (80, 80))]
    ):
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, "PNG")
        caption = f"a {colour} [trigger] toy" if index % 2 else None
        made.append(Picture(f"{index}.png", buffer.getvalue(), caption, None))
    return made


def bits(lora: LoRA) -> dict[str, bytes]:
    return {name: pair.A.numpy().tobytes() + pair.B.numpy().tobytes() for name, pair in lora.items()}


def test_the_base_is_as_it_was_and_every_layer_has_learnt(model: Family, pictures: list[Picture]) -> None:
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.denoiser.named_parameters()}
    lora = train_lora(model, pictures, QUICK)
    after = dict(model.denoiser.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        (id(p), p.requires_grad) == before[name][:2] and torch.equal(p, before[name][2]) and p.grad is None
        for name, p in after.items()
    )
    assert list(lora) == QUICK.targets(linear_shapes(model.denoiser))
    assert all(pair.B.abs().max() > 0 and pair.A.dtype == torch.float32 for pair in lora.values())


def test_a_run_taken_up_again_is_the_same_run(model: Family, pictures: list[Picture], tmp_path: Path) -> None:
    config = dataclasses.replace(
        QUICK, steps=20, checkpoint_interval=10, lr_scheduler="cosine", caption_dropout_rate=0.5
    )
    whole = train_lora(model, pictures, config)

    def stop_at(step: int, loss: float) -> None:
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(model, pictures, config, checkpoint=tmp_path / "run.safetensors", on_step=stop_at)
    steps: list[int] = []
    resumed = train_lora(
        model, pictures, config, checkpoint=tmp_path / "run.safetensors", on_step=lambda step, loss: steps.append(step)
    )
    assert steps == list(range(11, 21))
    assert bits(resumed) == bits(whole)


def test_training_lowers_the_loss_on_fixed_draws(model: Family, pictures: list[Picture]) -> None:
    config = dataclasses.replace(QUICK, steps=150)
    lora = train_lora(model, pictures, config)

    def fixed_loss() -> float:
        with torch.no_grad():
            pixels = torch.cat([torch.full((1, 3, 64, 64), value) for value in (-1.0, 0.0, 1.0)])
            conditioning = model.encode_prompt([config.prompt] * 3)
            latents = model.encode_images(pixels).mean
            draws = [torch.Generator().manual_seed(seed) for seed in range(20)]
            return float(torch.stack([model.loss(latents, conditioning, draw).mean() for draw in draws]).mean())

    untrained = fixed_loss()
    with trainable(model.denoiser, lora):
        trained = fixed_loss()
    assert trained < 0.95 * untrained
    assert fixed_loss() == untrained


def test_a_bf16_base_does_not_hold_small_steps_back(bases: Path, pictures: list[Picture]) -> None:
    model = load_model("flux", bases / "flux-dev", torch.device("cpu"), torch.bfloat16)
    config = dataclasses.replace(QUICK, steps=50, learning_rate=5e-5)
    start = {name: pair.A.detach().clone() for name, pair in new_layers(model, config).items()}
    lora = train_lora(model, pictures, config)
    unmoved = [float((start[name] == pair.A).float().mean()) for name, pair in lora.items()]
    assert np.mean(unmoved) < 0.01


def test_stock_diffusers_applies_the_file_as_we_do(model: Family, pictures: list[Picture], tmp_path: Path) -> None:
    lora = train_lora(model, pictures, QUICK)
    path = save_lora(tmp_path / "lora.safetensors", lora, model.component)
    request = Request("a sbu toy", num_inference_steps=3, guidance_scale=3.0, seed=1)
    [ours] = generate(model, request, content=model.read_lora(path))
    pipe = diffusers.DiffusionPipeline.from_pretrained(model.pipe.config._name_or_path)
    pipe.load_lora_weights(path)
    stock = type(model)(pipe)
    [theirs] = generate(stock, request)
    # One level of 255: peft adds its product after the base's, we merge it into the weight.
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_pictures_keep_their_captions_whatever_the_order(model: Family, pictures: list[Picture]) -> None:
    heard: list[tuple[float, float]] = []
    loss = model.loss

    def listening(
        latents: torch.Tensor, conditioning: dict[str, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        heard.extend(
            zip(
                latents.mean(dim=(1, 2, 3)).tolist(),
                conditioning["prompt_embeds"].sum(dim=(1, 2)).tolist(),
                strict=True,
            )
        )
        return loss(latents, conditioning, generator)

    model.loss = listening  # type: ignore[method-assign]
    train_lora(model, pictures, dataclasses.replace(QUICK, steps=12))
    pairs = {(round(latent, 1), round(caption, 1)) for latent, caption in heard}
    assert len(pairs) == len(pictures)


def test_presets_name_as_many_layers_as_published() -> None:
    unet, flux = (linear_shapes(build()) for build in (tiny.full_topology_unet, tiny.full_topology_flux))
    counted = {name: tuple(len(TrainConfig(lora_targets=name).targets(m)) for m in (unet, flux)) for name in TARGETS}
    assert counted["attention"] == (560, 190)
    assert counted["attention_qkv"] == (420, 171)
    assert counted["all"][1] == 494


def test_the_published_recipe_is_the_default_on_sdxl() -> None:
    config, sdxl = TrainConfig(), FAMILIES["sdxl"]
    assert (sdxl.lora_rank, sdxl.learning_rate, config.steps, config.batch_size) == (8, 5e-5, 1000, 1)
    assert (config.lr_scheduler, config.prompt) == ("constant", "a sbu subject")
    assert TrainConfig(lora_type="style", class_word="cat").prompt == "a cat in szn style"


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("lora_rank", 129), ("learning_rate", -1.0), ("learning_rate", float("nan")), ("lora_type", "face"),
     ("lora_targets", "some"), ("resolutions", (63,)), ("layers_to_optimize_regex", "("), ("lr_scheduler", "step")],
)  # fmt: skip
def test_an_absurd_setting_is_refused_in_a_sentence(field: str, value: object) -> None:
    name = "resolution" if field == "resolutions" else field
    with pytest.raises(RequestError, match=rf"^{name}.*\. Expected .*\.$"):
        TrainConfig(**{field: value})


def test_two_trained_loras_fuse(model: Family, pictures: list[Picture]) -> None:
    content, style = (train_lora(model, pictures, dataclasses.replace(QUICK, seed=seed)) for seed in (1, 2))
    facts: dict[str, float] = {}
    generate(model, Request("a sbu toy", num_inference_steps=4), content=content, style=style, record=facts.__setitem__)
    assert 0 < facts["style_share"] < 1
    assert Plan.constant((content,), (1.0,)).layers == tuple(content)
