"""The small models that caption and mask pictures: tiny BLIP and CLIPSeg folders, read by the real loading code."""

import json
import shutil
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from examples.tokenizers import clip_tokenizer
from klora.errors import BaseModelError
from klora.training.annotate import Captioner, Segmenter, autocaptioned, segmented
from klora.training.dataset import Picture
from klora.training.job import TrainingBase, run_training
from test_folder import tiny
from test_folder.jobs.short import held, weights_of
from test_folder.trainer.material import CPU, SETTINGS, png

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "'", "##ing", *dict.fromkeys(tiny.WORDS.split())]
Kind = type[Captioner | Segmenter]
ADVICE = {Captioner: "or set autocaption=false.", Segmenter: "or choose another mask_mode."}
kinds = pytest.mark.parametrize("kind", ADVICE)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the hub's: the model knows two tokens more than its tokenizer, and its config speaks of generation."""
    ids = {"vocab_size": len(TOKENS) + 2, "bos_token_id": len(TOKENS), "sep_token_id": 3}
    text = SIZES | ids | {"num_hidden_layers": 2, "initializer_range": 1.0}
    vision = SIZES | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
    folder = tmp_path_factory.mktemp("blip")
    with tiny._seeded(0):
        config = transformers.BlipConfig(text_config=text, vision_config=vision, initializer_range=0.3)
        transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["text_config"] |= {"max_length": 20, "num_beams": 4, "do_sample": True, "repetition_penalty": 1.0}
    (folder / "config.json").write_text(json.dumps(written))
    transformers.BertTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}).save_pretrained(folder)
    transformers.BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the hub's: the processor makes pictures larger than the positions that the model has learnt."""
    tokenizer, folder = clip_tokenizer(tiny.WORDS, "<|endoftext|>"), tmp_path_factory.mktemp("clipseg")
    text = SIZES | {"initializer_factor": 10.0} | tiny._token_ids(tokenizer)
    vision = SIZES | {"image_size": 32, "patch_size": 16}
    decoder = {"reduce_dim": 16, "extract_layers": [0, 1, 2], "use_complex_transposed_convolution": True}
    with tiny._seeded(0):
        config = transformers.CLIPSegConfig(text_config=text, vision_config=vision, **decoder)
        transformers.CLIPSegForImageSegmentation(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size=64, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(kind: Kind, blip: Path, clipseg: Path, tmp_path: Path) -> Path:
    return shutil.copytree(blip if kind is Captioner else clipseg, tmp_path / "copy")


def noise(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def picture(seed: int, caption: str | None = None, mask: bytes | None = None) -> Picture:
    return Picture(f"{seed}.png", png(noise(seed)), caption, mask)


def naive_caption(folder: Path, image: Image.Image) -> str:
    """The likeliest token after all tokens so far, without a cache, until [SEP] or 50 of them; spelt by hand."""
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
    small = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    pixels = torch.tensor((small - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    tokens = [len(TOKENS)]
    while len(tokens) < 51 and tokens[-1] != 3:
        tokens.append(int(model(pixels, torch.tensor([tokens])).logits[0, -1].argmax()))
    words = [TOKENS[token] for token in tokens[1:] if 5 <= token < len(TOKENS)]
    return " ".join(words).replace(" ##", "").replace(" ' ", "'")


def test_a_caption_is_the_likeliest_words_for_the_picture(blip: Path) -> None:
    captioner, images = Captioner.load(blip, CPU), [noise(seed) for seed in range(4)]
    captions = [captioner.caption(image) for image in images]
    assert captions == [naive_caption(blip, image) for image in images] == [captioner.caption(i) for i in images]
    assert len(set(captions)) == 4
    assert min(len(caption.split()) for caption in captions) < 20 < max(len(caption.split()) for caption in captions)


def test_a_caption_is_one_line_as_people_write_it(blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner.load(blip, CPU)
    tokens = torch.tensor([[len(TOKENS), *map(TOKENS.index, ("man", "'", "a", "standing", "##ing", "[SEP]"))]])
    monkeypatch.setattr(captioner.model, "generate", lambda *_, **__: tokens)
    assert captioner.caption(noise(0)) == "man'a standinging"
    monkeypatch.setattr(captioner.tokenizer, "decode", lambda *_, **__: " a dog\non a  table\n")
    assert captioner.caption(noise(0)) == "a dog on a table"


def test_pictures_with_a_caption_keep_it(blip: Path) -> None:
    pictures, captioner = [picture(0), picture(1, "a cat", b"mask")], Captioner.load(blip, CPU)
    first, second = autocaptioned(pictures, captioner, "TOK", "in oil")
    assert second is pictures[1]
    assert first == picture(0, f"TOK, {captioner.caption(noise(0))}, in oil")


JOINED = {
    ("", "a dog", ""): "a dog",
    ("TOK", "a dog", "in oil"): "TOK, a dog, in oil",
    ("[trigger]", "a dog", "[x]"): "[trigger], a dog, [x]",
    ("a photo of ", "a dog", " in oil"): "a photo of a dog in oil",
    ("a photo:", "a dog", ", in oil"): "a photo: a dog, in oil",
    ("TOK", "", "in oil"): "TOK, in oil",
    ("", "", ""): None,
}


@pytest.mark.parametrize(("parts", "expected"), JOINED.items())
def test_commas_stand_between_what_brings_none(parts: tuple[str, str, str], expected: str | None) -> None:
    parrot = SimpleNamespace(caption=lambda image: parts[1])
    assert autocaptioned([picture(0)], parrot, parts[0], parts[2]) == [picture(0, expected)]


def naive_mask(folder: Path, image: Image.Image, prompt: str) -> np.ndarray:
    model = transformers.CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    words = transformers.CLIPTokenizer.from_pretrained(folder)(prompt).input_ids
    small = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    pixels = torch.tensor((small - 0.4) / 0.5, dtype=torch.float32).permute(2, 0, 1)[None]
    logits = model(input_ids=torch.tensor([words]), pixel_values=pixels).logits[0].detach().numpy()
    chances = Image.fromarray(0.5 + 0.5 * np.tanh(0.5 * logits))
    return np.asarray(chances.resize(image.size, Image.Resampling.BILINEAR)) * 255


@pytest.mark.parametrize("size", [(90, 70), (40, 100)])
def test_a_mask_is_the_chance_of_the_thing(clipseg: Path, size: tuple[int, int]) -> None:
    mask = Segmenter.load(clipseg, CPU).mask(noise(0, *size), "a red teapot")
    assert (mask.mode, mask.size) == ("L", size)
    assert np.abs(np.asarray(mask) - naive_mask(clipseg, noise(0, *size), "a red teapot")).max() < 1
    assert np.asarray(mask).std() > 10


def test_a_mask_depends_on_the_prompt_of_which_the_beginning_counts(clipseg: Path) -> None:
    segmenter = Segmenter.load(clipseg, CPU)
    cat, dog, dogs = (np.asarray(segmenter.mask(noise(0), prompt), int) for prompt in ("cat", "dog", "dog " * 75))
    assert np.abs(cat - dog).max() > 5
    assert (dogs == np.asarray(segmenter.mask(noise(0), "dog " * 75 + "cat"))).all()


def test_pictures_with_a_mask_keep_it(clipseg: Path) -> None:
    pictures, segmenter = [picture(0, "a cat"), picture(1, mask=b"mine")], Segmenter.load(clipseg, CPU)
    first, second = segmented(pictures, segmenter, "a dog")
    assert second is pictures[1]
    assert first == picture(0, "a cat", png(segmenter.mask(noise(0), "a dog")))


@kinds
def test_a_loaded_model_is_frozen(kind: Kind, copy: Path) -> None:
    model = kind.load(copy, CPU).model
    assert not model.training
    assert {(p.requires_grad, p.dtype, p.device) for p in model.parameters()} == {(False, torch.float32, CPU)}


def assert_refused(kind: Kind, folder: Path, complaint: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        kind.load(folder, CPU)
    said, _, advised = str(caught.value).partition(" Install a ")
    assert said.startswith(f"The {kind.__name__.lower()} ") and advised.endswith(f", {ADVICE[kind]}")
    assert complaint in said and str(folder) in said and said.find(". ") < 0 and said[-1] == "." and "\n" not in said


@kinds
def test_a_model_is_loaded_beside_the_thread_that_is_interrupted(
    kind: Kind, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise OSError(f"in {'this' if get_ident() == here else 'another'} thread")

    here = get_ident()
    for model in (transformers.BlipForConditionalGeneration, transformers.CLIPSegForImageSegmentation):
        monkeypatch.setattr(model, "from_pretrained", load)
    assert_refused(kind, copy, "in another thread")


@kinds
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_an_incomplete_folder_is_refused(kind: Kind, copy: Path, file: str) -> None:
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[:-100])
    assert_refused(kind, copy, "cannot be loaded")
    (copy / file).unlink()
    says = {"config.json": f"is not installed: {copy} has no config.json", "tokenizer.json": "has a tokenizer of "}
    assert_refused(kind, copy, says.get(file, "cannot be loaded"))


@kinds
@pytest.mark.parametrize(("spoilt", "says"), [([], "lacks {}"), ([1.0] * 7, "lacks {}"), ([np.nan] * 32, "in {}")])
def test_a_tensor_that_says_nothing_is_refused(kind: Kind, copy: Path, spoilt: list[float], says: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("layer_norm1.weight"))
    tensors |= {name: torch.tensor(spoilt)}
    save_file({key: tensors[key] for key in tensors if tensors[key].numel()}, copy / "model.safetensors")
    assert_refused(kind, copy, says.format(name))


def test_a_training_learns_from_both(
    blip: Path, clipseg: Path, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions and masks that models make give another LoRA than none, and than each other's prompts; a mask is of the
    class unless something else is to be looked for, and a caption is as learnt as one that a file has."""
    monkeypatch.setattr("klora.training.draw.FIXED_POINTS", 1)  # which tell of the run, and take most of its time
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "captioner").symlink_to(blip)
    (tmp_path / "models" / "segmenter").symlink_to(clipseg)
    (tmp_path / "pictures").mkdir()
    noise(1).save(tmp_path / "pictures" / "a.png")
    base = TrainingBase("sdxl", "sdxl", bases / "sdxl", "me/base", "MIT", tmp_path / "models")
    around = {"autocaption_prefix": "[trigger] toy", "autocaption_suffix": "seen"}

    def learnt(**given: Any) -> frozenset[tuple[str, bytes]]:
        settings = SETTINGS | {"steps": 1, "instance_prompt": "a [trigger]"} | given
        tar = run_training(base, tmp_path / "pictures", settings, tmp_path / "lora.tar")
        return frozenset(weights_of(held(tar)).items())

    house = {"mask_mode": "clipseg", "mask_prompt": "a red house"}
    dog, captioned = learnt(mask_mode="clipseg", class_word="a dog"), learnt(autocaption=True, **around)
    assert learnt(mask_mode="clipseg", mask_prompt="a dog") == dog
    assert len({learnt(), learnt(autocaption=True), captioned, dog, learnt(**house, class_word="a dog")}) == 5
    [told] = autocaptioned([picture(1)], Captioner.load(blip, CPU), *around.values())
    (tmp_path / "pictures" / "a.txt").write_text(str(told.caption))
    assert learnt() == captioned
