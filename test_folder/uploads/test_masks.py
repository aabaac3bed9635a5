"""A mask goes with the picture of its stem and size, or it is reported and never trained."""

from pathlib import Path

from PIL import Image

from klora.training.dataset import Picture, read_upload
from test_folder.uploads.packing import PNG, drawn, encoded, in_zip, reasons


def test_masks_go_with_the_picture_of_their_stem(tmp_path: Path) -> None:
    mask = encoded(Image.new("L", (80, 70), 200))
    files = {"a.jpg": encoded(drawn(), "JPEG"), "a.mask.png": mask, "x/b.png": PNG, "x/masks/b.png": mask, "c.png": PNG}
    files |= {"d.png": PNG, "d.Mask.png": mask, "x/y/e.png": PNG, "x/masks/y/e.png": mask}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    masked = dict.fromkeys(["a.jpg", "d.png", "x/b.png", "x/y/e.png"], mask)
    assert {p.name: p.mask for p in pictures} == {**masked, "c.png": None}
    assert not skipped
    shown = pictures[0].open_mask()
    assert shown is not None
    assert (shown.mode, shown.size, shown.getpixel((0, 0))) == ("L", (80, 70), 200)
    assert pictures[1].open_mask() is None


def test_a_mask_that_fits_no_picture_is_reported_and_never_trained(tmp_path: Path) -> None:
    mask = encoded(Image.new("L", (90, 70)))
    pictures, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "a.mask.png": mask, "masks/b.png": mask}))
    assert [(p.name, p.mask) for p in pictures] == [("a.png", None)]
    said = "is a mask of 90x70, and no picture of its name and size lacks one (of its name: {})"
    assert reasons(skipped) == {"a.mask.png": said.format("80x70"), "masks/b.png": said.format("none")}


def test_a_second_mask_of_a_picture_is_reported(tmp_path: Path) -> None:
    first, second = (encoded(Image.new("L", (80, 70), level)) for level in (100, 200))
    files = {"a.png": PNG, "a.mask.png": first, "masks/a.png": second}
    [picture], skipped = read_upload(in_zip(tmp_path, files))
    assert picture.mask == first and reasons(skipped).keys() == {"masks/a.png"}


def test_a_transparent_mask_is_black_there() -> None:
    image = Image.new("RGBA", (80, 80), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (40, 0, 80, 80))
    mask = Picture("x", PNG, None, encoded(image)).open_mask()
    assert mask is not None
    assert (mask.getpixel((0, 0)), mask.getpixel((79, 0))) == (0, 255)
