"""An image of a prompt file, drawn in a batch, made again by itself: what `klora reproduce` says of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from klora import cli
from klora.studio.likeness import ROUNDING, difference
from test_folder.bulk.prompting import PROMPTS, far, written

OPTIONS = ("--num-inference-steps", "2", "--disable-safety-checker", "--model", "sdxl")
BATCHED = "as those of an image from a prompt file may, which was drawn in a batch, or of one by other threads"


def test_an_image_of_a_batch_comes_again_to_a_few_levels_and_the_words_say_why(shell: Path) -> None:
    written(shell / "p.txt", *PROMPTS)
    made = CliRunner().invoke(cli.app, ["generate", "p.txt", "--style-lora", "style.safetensors", *OPTIONS])
    assert made.exit_code == 0, made.stderr
    for number in range(len(PROMPTS)):
        file = shell / "out" / f"0000{number}.png"
        result = CliRunner().invoke(cli.app, ["reproduce", str(file)])
        [again] = [shell / line for line in result.stdout.splitlines() if line.startswith("reproduced/")]
        most = far(Image.open(file), Image.open(again))
        assert (result.exit_code, most <= ROUNDING) == (0, True)
        said = f"Warning: its pixels differ from those of {file.name} by up to {most} of 255, {BATCHED}."
        assert said in result.stderr if most else f"the same pixels as {file.name}" in result.stdout


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (0, ""),
        (1, f"its pixels differ from those of a.png by up to 1 of 255, {BATCHED}."),
        (ROUNDING + 1, f"its pixels differ from those of a.png by up to {ROUNDING + 1} of 255."),
    ],
)
def test_a_few_levels_are_a_batchs_and_more_are_not(tmp_path: Path, levels: int, said: str) -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[1, 2, 2] += levels
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert difference(tmp_path / "a.png", tmp_path / "b.png") == said
