"""Every number of a report is that of a naive computation, and the one that a request acts on."""

import math

import pytest
import torch

from klora.errors import RequestError
from klora.form.request import Request
from klora.fusion import Schedule, fuse
from klora.generation import combine
from klora.lora import LoRA, LowRank
from klora.report import report_on
from klora.report.numbers import BIASES, QUANTILES, _balance
from test_folder.report.reporting import healthy, made, names, partly_shared, reported

PUBLISHED = [("s", 1.5, 0.5), ("s*", 1.5, 1.275)]


class Naive:
    """All of a report from dense products, one layer and one step at a time."""

    def __init__(self, content, style, kind, schedule, steps):
        self.layers = [name for name in names() if name in content or name in style]
        self.shared = [name for name in self.layers if name in content and name in style]
        self.scale = [schedule(i, steps) for i in range(steps)]
        l1, top = {}, {}
        for role, lora in (("content", content), ("style", style)):
            for name, pair in lora.items():
                entries = sorted((pair.B.double() @ pair.A.double()).abs().flatten().tolist(), reverse=True)
                k = content[name].rank * style[name].rank if name in self.shared else pair.rank
                l1[role, name], top[role, name] = sum(entries), sum(entries[:k])
        ratios = [l1["content", n] / l1["style", n] for n in self.shared]
        mean = sum(ratios) / len(ratios)
        kept = [ratio for ratio in ratios if ratio < 3 * mean]
        sums = [sum(l1[role, n] for n in self.shared) for role in ("content", "style")]
        self.gammas = {"reference": sum(kept) / len(kept), "paper": sums[0] / sums[1]}
        gamma = self.gammas[kind]
        self.R = {n: top["content", n] / (gamma * top["style", n]) for n in self.shared}
        self.R |= {n: math.inf if n in content else 0.0 for n in self.layers if n not in self.shared}

    def wins(self, bias):
        return [[self.R[name] > bias * scale for name in self.layers] for scale in self.scale]

    def share(self, bias):
        cells = [won for step in self.wins(bias) for won in step]
        return 1 - sum(cells) / len(cells)


@pytest.mark.parametrize("kind", ["reference", "paper"])
@pytest.mark.parametrize("bias", [1.0, 0.6])
@pytest.mark.parametrize(("pattern", "alpha", "beta"), PUBLISHED)
def test_every_number_is_the_naive_one(pattern, alpha, beta, bias, kind):
    content, style = partly_shared()
    report = report_on(fuse(content, style, gamma=kind), Schedule.from_pattern(pattern), 12, bias)

    def scale(i, steps):
        line = alpha * (i + 0.5) / steps + beta
        return line % alpha if pattern == "s*" else line

    naive = Naive(content, style, kind, scale, 12)
    wins = naive.wins(bias)
    columns = [[step[naive.layers.index(name)] for step in wins] for name in naive.shared]
    about = {"rel": 1e-5}  # products in float32
    assert report.layers == tuple(naive.layers)
    assert dict(report.owners) == {"both": 35, "content": 2, "style": 3}
    assert dict(zip(report.layers, report.ratio.tolist(), strict=True)) == pytest.approx(naive.R, **about)
    assert report.gammas == pytest.approx(naive.gammas, **about) and report.gamma == report.gammas[kind]
    assert report.thresholds.tolist() == pytest.approx([bias * s for s in naive.scale])
    assert report.content_wins.tolist() == wins
    assert report.style_share_by_step == pytest.approx([1 - sum(step) / len(step) for step in wins])
    assert report.style_share == pytest.approx(naive.share(bias))
    assert report.always == {"content": sum(map(all, columns)), "style": sum(not any(c) for c in columns)}
    assert report.slider == pytest.approx({b: naive.share(b) for b in BIASES})
    R = sorted(naive.R[name] for name in naive.shared)
    assert report.quantiles == pytest.approx({q: R[round(q * 34)] for q in QUANTILES}, **about)
    assert report.ranks == {"content": {4: 37}, "style": {5: 38}}


def test_the_slider_has_the_five_stops_and_more_style_at_each():
    assert {0.5, 0.7, 1, 1.4, 2} <= set(BIASES) and (min(BIASES), max(BIASES)) == (0.25, 4)
    shares = list(healthy().slider.values())
    assert shares == sorted(shares) and shares[0] < 0.05 and shares[-1] > 0.95


@pytest.mark.parametrize(("pattern", "alpha", "beta"), PUBLISHED)
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_balance_is_where_style_acts_in_a_half(pattern, alpha, beta, spread):
    loras = (made(names(), seed=1, spread=spread), made(names(), seed=2, spread=spread))
    report = reported(*loras, pattern=pattern, steps=30)
    assert reported(*loras, pattern=pattern, steps=30, style_bias=report.balance).style_share == pytest.approx(
        0.5, abs=0.02
    )


def test_the_balance_itself_is_enough_for_half_of_the_layers():
    assert _balance(torch.tensor([2.0, 1.0, 2.0, 1.0]), torch.ones(1)) == 1.0


def test_there_is_no_balance_where_all_is_one_choice():
    lora = made(names())
    assert reported(lora, lora, steps=1).balance is None  # all of it or none
    assert (
        reported(lora, {}).balance is None and reported({}, lora).balance is None and reported({}, {}).balance is None
    )


def test_the_style_share_is_the_metric_of_a_request():
    content, style = (LoRA(lora) for lora in partly_shared())
    facts = {}
    plan = combine(Request("x", pattern="s", style_bias=1.3), 17, content, style, facts.__setitem__)
    report = reported(content, style, steps=17, style_bias=1.3)
    assert (report.style_share, report.gamma) == pytest.approx(
        (1 - plan.content_wins.double().mean().item(), facts["gamma"])
    )


def test_a_layer_that_is_zero_in_both_is_styles_as_in_the_choice():
    content, style = made(names(), seed=1), made(names(), seed=2)
    for lora in (content, style):
        lora[names()[0]] = LowRank(torch.zeros(4, 24), torch.zeros(24, 4))
    report = reported(content, style)
    assert report.ratio[0] == 0 and not report.content_wins[:, 0].any() and report.warnings == ()


@pytest.mark.parametrize(("steps", "bias"), [(0, 1.0), (-1, 1.0), (20, -0.1), (20, math.inf), (20, math.nan)])
def test_what_makes_no_sense_is_refused(steps, bias):
    with pytest.raises(RequestError, match=r"^(steps|style_bias) is .*\. Expected"):
        healthy(steps=steps, style_bias=bias)
