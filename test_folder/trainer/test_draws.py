"""What a training is shown: pictures, captions and halves of them; and that its steps are the textbook's."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from klora import FAMILIES
from klora.models.family import Family, Posterior
from klora.models.linears import linear_shapes
from klora.training.cache import encode_pictures
from klora.training.config import TrainConfig
from klora.training.dataset import Picture, captioned
from klora.training.draw import Draw
from klora.training.loop import Load, _examples, encode, new_layers, train_lora
from klora.training.objective import Batch, Objective
from klora.training.trainable import trainable
from test_folder.trainer.material import CPU, QUICK, config, png


def spied(load: Load, predicted: list[dict[str, Any]]) -> Load:
    """The same, whose models tell what they are asked to predict."""

    def loaded(**options: Any) -> Family:
        model = load(**options)
        predict = model.predict

        def listening(latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, conditioning: Any) -> Any:
            if latents.device == CPU:
                predicted.append(
                    {
                        "latents": latents,
                        "noise": noise,
                        "times": times,
                        "grad": torch.is_grad_enabled(),
                        **conditioning,
                    }
                )
            return predict(latents, noise, times, conditioning)

        model.predict = listening  # type: ignore[method-assign]
        return model

    return loaded


def drawn(load: Load, pictures: list[Picture], settings: TrainConfig, count: int) -> list[Batch]:
    """The first batches of a training on SDXL, without the training."""
    material = encode(load, pictures, tuple, settings, CPU)
    draw = Draw(material, settings, FAMILIES["sdxl"].recipe.times, CPU)
    return [draw.batch(number) for number in range(count)]


# Batches


def test_pictures_keep_their_captions_whatever_the_order(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    train_lora(spied(load, heard), pictures, config(steps=8), tmp_path)
    pairs = {(round(float(h["latents"].mean()), 2), h["prompt_embeds"].numpy().tobytes()) for h in heard}
    assert len(pairs) == len(pictures)


def test_a_training_is_shown_these_batches(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    """Those that the following tests look at, one after the other, and after each the class's of its number."""
    heard: list[dict[str, Any]] = []
    settings = config(steps=3, gradient_accumulation_steps=2, caption_dropout_rate=0.5, horizontal_flip=True)
    settings = replace(settings, prior_preservation="class_images", class_word="toy")
    of_the_class = [replace(picture, caption=None) for picture in pictures[:2]]
    train_lora(spied(load, heard), pictures, settings, tmp_path, class_pictures=lambda: of_the_class)
    seen = [draw for draw in heard if draw["grad"]]
    material = encode(load, pictures, lambda: of_the_class, settings, CPU)
    assert [example.caption for example in material.class_examples] == ["a toy"] * 2
    draw = Draw(material, settings, load(device=CPU, parts=()).recipe.times, CPU)
    expected_batches = [batch for n in range(6) for batch in (draw.batch(n), draw.class_batch(n)) if batch]
    for batch, shown in zip(expected_batches, seen, strict=True):
        expected = {"latents": batch.latents, "noise": batch.noise, "times": batch.times, **batch.conditioning}
        assert all(torch.equal(shown[name], part) for name, part in expected.items())


def test_caption_dropout_takes_about_its_share(sdxl: Load, pictures: list[Picture]) -> None:
    batches = drawn(sdxl, pictures, config(caption_dropout_rate=0.5), 400)
    with torch.no_grad():
        blank = sdxl(device=CPU, parts=("text",)).encode_prompt([""])["prompt_embeds"]
    dropped = [torch.equal(batch.conditioning["prompt_embeds"], blank) for batch in batches]
    assert 170 <= sum(dropped) <= 230  # three standard deviations


def test_captions_of_unlike_length_in_a_batch_are_padded_with_what_says_nothing(
    sdxl: Load, pictures: list[Picture]
) -> None:
    settings, encoder = config(batch_size=2, caption_dropout_rate=0.0), sdxl(device=CPU, parts=("text",))
    told = [replace(pictures[0], caption=text) for text in ("a dog", "a dog " * 60)]
    captions = [captioned(picture, settings.trigger, settings.prompt) for picture in told]
    with torch.no_grad():
        short, long, blank = (encoder.encode_prompt([text])["prompt_embeds"] for text in (*captions, ""))
    assert long.shape[1] == 2 * blank.shape[1]
    [batch] = drawn(sdxl, told, settings, 1)
    rows = batch.conditioning["prompt_embeds"].split(1)
    assert any(torch.equal(row, long) for row in rows)
    assert any(torch.equal(row, torch.cat([short, blank], dim=1)) for row in rows)


def test_a_flip_shows_both_sides(sdxl: Load) -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 32, 64))
    batches = drawn(sdxl, [Picture("0.png", png(image), None, None)], config(horizontal_flip=True), 20)
    assert len({round(float(batch.latents[..., :4].mean()), 2) for batch in batches}) == 2


def every_eighth(pixels: torch.Tensor) -> Posterior:
    return Posterior(pixels[..., ::8, ::8], torch.zeros(1))


COARSE: Any = SimpleNamespace(encode_images=every_eighth, native_size=512, recipe=SimpleNamespace(resolutions=(0.5, 1)))


def test_random_crops_are_of_the_picture_and_the_seed_and_not_of_its_name() -> None:
    image = Image.linear_gradient("L").resize((64, 256)).convert("RGB")  # of which a half is left out
    first = Picture("a.png", png(image), None, None)
    shown = [first, replace(first, name="b.png"), replace(first, data=png(image.rotate(180)))]

    def places(seed: int) -> list[list[tuple[float, ...]]]:
        examples = encode_pictures(COARSE, shown, [""] * 3, config(crop="random", seed=seed))
        return [[tuple(view.time_ids.tolist()) for view in example.views] for example in examples]

    ours, renamed, other = places(1)
    assert ours == renamed != other and len(set(ours)) > 1
    assert places(2)[0] != ours


def test_a_salient_crop_goes_where_the_mask_is() -> None:
    mask = Image.new("L", (64, 256))
    mask.paste(255, (0, 240, 64, 256))
    shown = [Picture("a.png", png(Image.new("RGB", (64, 256))), None, png(mask))]
    asked = config(crop="salience", mask_mode="provided", resolution="64,128")
    examples = list(encode_pictures(COARSE, shown, ["a dog"], asked))
    for example in examples:
        [view] = example.views
        _, _, top, left, height, width = view.time_ids.tolist()
        assert (top, left) == (round(256 * width / 64) - height, 0) and view.mask is not None and view.mask[0, -1].any()
    assert [width * height for width, height in (example.size for example in examples)] == pytest.approx(
        [64**2, 128**2], rel=0.1
    )


def test_of_many_pictures_it_is_told_how_far_their_encoding_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shown = [Picture("a.png", png(Image.new("RGB", (64, 64))), None, None)] * 125
    assert len(_examples(lambda **_: COARSE, shown, ["a dog"] * 125, config(resolution="64,96"), CPU)) == 250
    assert caplog.messages == ["encoded 40% of the pictures", "encoded 80% of the pictures"]


def test_where_no_resolution_is_named_pictures_are_seen_at_those_of_the_base() -> None:
    shown = [Picture("a.png", png(Image.new("RGB", (64, 64))), None, png(Image.new("L", (64, 64))))]
    examples = list(encode_pictures(COARSE, shown, ["a dog"], config(resolution="")))
    assert [(example.size, example.caption) for example in examples] == [((256, 256), "a dog"), ((512, 512), "a dog")]
    assert [view.mask for example in examples for view in example.views] == [None, None]  # mask_mode is none


def test_center_cuts_squares(sdxl: Load, pictures: list[Picture]) -> None:
    shapes = {
        crop: {tuple(batch.latents.shape[-2:]) for batch in drawn(sdxl, pictures, config(crop=crop), 8)}
        for crop in ("bucket", "center")
    }
    assert shapes["center"] == {(8, 8)}
    assert len(shapes["bucket"]) > 1


def test_a_batch_of_two_is_two_batches_of_one(load: Load, tmp_path: Path) -> None:
    """In the gradient; not in the draws, which are keyed by the batch."""
    model = load(device=CPU)
    with torch.no_grad():
        latents = model.encode_images(torch.rand(2, 3, 64, 64) * 2 - 1).mean
        texts = {n: t for n, t in model.encode_prompt(["a dog", "a cat"]).items() if not n.startswith("negative")}
    noise, times = torch.randn_like(latents), torch.tensor([0.3, 0.7])
    shapes = linear_shapes(model.denoiser)
    layers = new_layers({n: shapes[n] for n in QUICK.targets(shapes)}, 4, 0, CPU)
    for pair in layers.values():
        torch.nn.init.normal_(pair.B, std=0.1)

    def part(rows: slice) -> Batch:
        return Batch(latents[rows], noise[rows], times[rows], {name: text[rows] for name, text in texts.items()})

    whole, parts = part(slice(2)), [part(slice(0, 1)), part(slice(1, 2))]
    gradients = []
    with trainable(model.denoiser.requires_grad_(False), layers) as gate:
        objective = Objective(model, gate)
        for batches in ([whole], parts):
            for batch in batches:
                (objective(batch) / len(batches)).backward()
            gradients.append([pair.A.grad.clone() for pair in layers.values()])
            for pair in layers.values():
                pair.A.grad = pair.B.grad = None
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_the_loop_is_the_textbooks(load: Load, pictures: list[Picture], tmp_path: Path) -> None:
    """peft's layers, torch's AdamW and clipping, the formulas written out; only what was drawn is taken over."""
    heard: list[dict[str, Any]] = []
    settings = config(steps=3, gradient_accumulation_steps=2, max_grad_norm=0.01, weight_decay=1.0, snr_gamma=2.0)
    settings = replace(settings, lora_alpha=2.0)
    lora = train_lora(spied(load, heard), pictures, settings, tmp_path)
    model = load(device=CPU)
    denoiser = model.denoiser.requires_grad_(False)
    shapes = {name: shape for name, shape in linear_shapes(denoiser).items() if name in lora}
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(shapes)))
    adapted = {name: denoiser.get_submodule(name) for name in shapes}
    with torch.no_grad():
        for name, pair in new_layers(shapes, 4, settings.seed, CPU).items():
            adapted[name].lora_A["default"].weight.copy_(pair.A)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1.0)
    draws = [draw for draw in heard if draw["grad"]]
    for number, draw in enumerate(draws):
        (NAIVE[model.name](denoiser, draw) / 2).backward()
        if number % 2:
            torch.nn.utils.clip_grad_norm_(trained, 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert len(draws) == 6
    trained_pairs = [
        (ours, layer.weight)
        for name, pair in lora.items()
        for ours, layer in ((pair.A, adapted[name].lora_A["default"]), (2 * pair.B, adapted[name].lora_B["default"]))
    ]
    # Adam makes whole steps of gradients that are rounding alone: on some processors one in thousands of elements.
    alike = torch.cat([torch.isclose(a, b, rtol=1e-3, atol=1e-5).flatten() for a, b in trained_pairs])
    assert alike.float().mean() > 0.999
    assert all((a - b).abs().max() < 5e-4 for a, b in trained_pairs)


def naive_sdxl(unet: Any, draw: dict[str, Any]) -> torch.Tensor:
    """Squared error of the noise; SDXL's betas."""
    steps = (draw["times"] * 1000).long()
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[steps][:, None, None, None]
    noised = kept.sqrt() * draw["latents"] + (1 - kept).sqrt() * draw["noise"]
    added = {"text_embeds": draw["pooled_prompt_embeds"], "time_ids": draw["time_ids"]}
    predicted = unet(noised, steps, draw["prompt_embeds"], added_cond_kwargs=added).sample
    snr = kept / (1 - kept)
    return ((predicted - draw["noise"]).square() * snr.clamp(max=2) / snr).mean()


def naive_flux(transformer: Any, draw: dict[str, Any]) -> torch.Tensor:
    """Squared error of noise - latents; a token is 2 x 2 cells."""

    def tokens(cells: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(cells, 2, stride=2).mT

    height, width = (side // 2 for side in draw["latents"].shape[-2:])
    sigma = draw["times"][:, None, None]
    latents, noise = tokens(draw["latents"]), tokens(draw["noise"])
    predicted = transformer(
        hidden_states=(1 - sigma) * latents + sigma * noise,
        timestep=draw["times"],
        guidance=torch.ones(len(latents)),
        encoder_hidden_states=draw["prompt_embeds"],
        pooled_projections=draw["pooled_prompt_embeds"],
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))),
        txt_ids=torch.zeros(draw["prompt_embeds"].shape[1], 3),
    ).sample
    snr = ((1 - sigma) / sigma).square()
    return ((predicted - (noise - latents)).square() * snr.clamp(max=2) * sigma.square()).mean()


NAIVE = {"SDXL": naive_sdxl, "FLUX.1": naive_flux}
