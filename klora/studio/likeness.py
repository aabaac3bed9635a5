"""An image that was made again, held against the first. Knows nothing of how either was made."""

from pathlib import Path

from PIL import Image, ImageChops

ROUNDING = 3  # levels of 255, by which an image drawn in a batch, or by other threads, may differ from its like


def difference(original: Path, again: Path) -> str:
    """In one sentence, how the second image file differs from the first; "" where the pixels are the same."""
    try:
        with Image.open(original) as first, Image.open(again) as second:
            pair = first.convert("RGB"), second.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # whichever Pillow has for what is cut off or damaged
        return f"{original.name} is damaged, so that the pixels cannot be compared."
    if pair[0].size != pair[1].size:
        return f"it is {pair[1].width}x{pair[1].height}, and {original.name} is not."
    most = max(ImageChops.difference(*pair).tobytes())
    if not most:
        return ""
    cause = ""
    if most <= ROUNDING:
        cause = ", as those of an image from a prompt file may, which was drawn in a batch, or of one by other threads"
    return f"its pixels differ from those of {original.name} by up to {most} of 255{cause}."
