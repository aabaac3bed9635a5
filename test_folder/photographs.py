"""What cameras write beside the pixels: EXIF that turns a picture by a quarter, with a tag beside it that Pillow reads
and cannot write again; profiles of colours."""

import struct

from PIL import ImageCms

TURNED = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
ODD_TAGS = {
    "a resolution unit that is a text": TURNED + struct.pack("<HHI4s", 0x0128, 2, 2, b"2"),
    "a maker that is a number": struct.pack("<HHI4s", 0x010F, 11, 1, struct.pack("<f", 1.5)) + TURNED,
}
ODD_EXIF = {
    name: b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + bytes(4)
    for name, entries in ODD_TAGS.items()
}

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# sRGB with the colours of red and blue exchanged.
BGR = SRGB.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
