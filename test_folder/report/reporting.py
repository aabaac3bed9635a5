"""Pairs of random LoRAs, files of them, the reports on them, and JSON read strictly."""

import json

import torch

from klora.fusion import Schedule, fuse
from klora.lora import LowRank
from klora.report import report_on

BLOCKS = ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0")


def names(count=40):
    return [f"{BLOCKS[i * len(BLOCKS) // count]}.attentions.0.to_{i}" for i in range(count)]


def made(layers, rank=4, seed=0, spread=0.2, scale=1.0, side=24):
    """{name: pair} of Gaussian factors; spread: of the logarithm of a layer's magnitude."""
    generator = torch.Generator().manual_seed(seed)
    factors = scale * torch.exp(spread * torch.randn(len(layers), generator=generator))
    pairs = {}
    for name, factor in zip(layers, factors, strict=True):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, side), (side, rank)))
        pairs[name] = LowRank(A, B * factor)
    return pairs


def reported(content, style, pattern="s", steps=20, style_bias=1.0, **options):
    return report_on(fuse(content, style), Schedule.from_pattern(pattern), steps, style_bias, **options)


def healthy(**options):
    return reported(made(names(), seed=1), made(names(), seed=2), **options)


def partly_shared():
    """40 layers, of which content lacks the first three and style the last two."""
    return made(names()[3:], rank=4, seed=1, spread=0.5), made(names()[:-2], rank=5, seed=2, spread=0.5)


def strictly(text):
    def refused(token):
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refused)
