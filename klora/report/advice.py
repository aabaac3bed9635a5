"""What a user should know of a pair and can put right: one sentence or two each, with the number and the remedy."""

from collections.abc import Iterator

import torch

from klora.fusion import Fusion
from klora.report.numbers import BALANCED, MOST_BIAS, Report

FAR_APART = 10.0  # times, that one LoRA's magnitude is the other's
STUCK = 2 / 3  # of the shared layers, that never switch
FAVOURED = 1.15  # times, that unequal ranks shift R
ALIKE = 3  # layers that switch together are no accident


def advice(fusion: Fusion, report: Report) -> tuple[str, ...]:
    """The warnings, most serious first; () for a healthy pair. A LoRA of zeros explains all else, which is left out."""
    if zeros := [role for role in ("content", "style") if _is_zero(fusion, role)]:
        return tuple(
            f"The {role} LoRA is all zeros: it changes nothing where it acts. Train it first." for role in zeros
        )
    return (*_few_shared(report), *_magnitudes(report), *_ranks(fusion), *_alike(report), *_never_switching(report))


def _is_zero(fusion: Fusion, role: str) -> bool:
    scores = {"content": fusion.content_score, "style": fusion.style_score}
    return bool({"content": fusion.content, "style": fusion.style}[role]) and not scores[role].any()


def _few_shared(report: Report) -> Iterator[str]:
    shared, content, style = (report.owners[owner] for owner in ("both", "content", "style"))
    if not shared:
        yield (
            f"No layer is in both LoRAs ({content} content's, {style} style's): there is nothing to choose, and "
            "style_bias changes nothing. Take LoRAs that were trained on the same layers."
        )
    elif shared < (content + style + shared) / 2:
        yield (
            f"Only {shared} of {len(report.layers)} layers are in both LoRAs, where alone there is a choice: content "
            f"always acts in its own {content}, style in its own {style}. LoRAs trained on the same layers fuse best."
        )


def _magnitudes(report: Report) -> Iterator[str]:
    gamma = report.gammas["paper"]
    larger, smaller, times = ("content", "style", gamma) if gamma > 1 else ("style", "content", 1 / gamma)
    if times >= FAR_APART:
        yield (
            f"Magnitudes differ {times:.0f}x: so much larger are the {larger} LoRA's weights than the {smaller} one's. "
            f"gamma evens that out in the choice, not in the image. Check both files' alphas, or lower {larger}_scale."
        )


def _ranks(fusion: Fusion) -> Iterator[str]:
    """gamma evens out the sums of all |dW|, but the choice compares the K largest: with few ranks,
    these hold more of the sum.

    R is off by (1 + 2/low) / (1 + 2/high): fitted to products of Gaussian factors, 1280 x 1280, of ranks 1 to 128, and
    within 10 % of them. Trained factors have fewer directions than ranks, hence "up to".
    """
    shared = [name for name in fusion.content if name in fusion.style]
    if not shared:
        return
    content, style = (
        int(torch.tensor([lora[n].rank for n in shared]).median()) for lora in (fusion.content, fusion.style)
    )
    favour = (1 + 2 / content) / (1 + 2 / style)
    if not 1 / FAVOURED < favour < FAVOURED:
        role, times = ("content", favour) if content < style else ("style", 1 / favour)
        yield (
            f"Ranks {content} (content) and {style} (style) favour {role}: the fewer ranks, the more the largest "
            f"weights stand out from the sum that gamma evens out, up to {times:.1f}x here. "
            f"style_bias {favour:.2g} allows for it."
        )


def _alike(report: Report) -> Iterator[str]:
    wins = report.content_wins[:, report.shared]
    switches = (wins[1:, :1] != wins[:-1, :1]).flatten().nonzero().flatten()
    if wins.shape[1] >= ALIKE and len(switches) and bool((wins == wins[:, :1]).all()):
        low, high = report.ratio[report.shared].aminmax()
        yield (
            f"All {wins.shape[1]} shared layers are alike (R {low:.2g} to {high:.2g}): they all switch as step "
            f"{int(switches[0]) + 2} of {report.steps} begins, so steps are chosen, not layers. Are both the same LoRA?"
        )


def _never_switching(report: Report) -> Iterator[str]:
    shared, always = report.owners["both"], report.always
    stuck, share = sum(always.values()), report.style_share
    if share is None or not shared or stuck < STUCK * shared:
        return
    if report.steps == 1:
        yield "There is one step, so that no layer can switch: give num_inference_steps more."
        return
    yield (
        f"{stuck} of {shared} shared layers ({stuck / shared:.0%}) never switch: {always['content']} are always "
        f"content's, {always['style']} always style's. {_remedy(report, share)}"
    )


def _remedy(report: Report, share: float) -> str:
    if abs(share - 0.5) <= BALANCED:
        return f"Style acts in {share:.0%} even so; a larger alpha lets more of them switch."
    if report.balance is None:
        return f"Style acts in {share:.0%}, and no style_bias up to {MOST_BIAS:g} brings that near a half."
    return f"Try style_bias {report.balance:g}, which brings style's share from {share:.0%} to about a half."
