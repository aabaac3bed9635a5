"""What the tests of runs draw, and with what."""

import re

import numpy as np

from klora.form.request import Request
from klora.lora import LowRank
from test_folder import tiny

ENGINES = {"gated": 0, "merged": 1 << 60}  # bytes of memory that make attached() choose it
SENTENCE = "a photo of a sks dog in watercolor style"
STEPS = 4


def random_lora(model, rank, seed, pattern=""):
    shapes = {name: shape for name, shape in tiny.linear_shapes(model).items() if re.search(pattern, name)}
    return {name: LowRank(*pair) for name, pair in tiny.random_lora(shapes, rank, seed=seed).items()}


def asked(**options):
    return Request(**{"prompt": SENTENCE, "seed": 7, "num_inference_steps": STEPS} | options)


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)
