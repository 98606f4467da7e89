"""What Pillow's resize gives with columns first, as every Pillow before 13 did it."""

from PIL import Image


def resized(image, size, box=None):
    """Return the box of a picture as a picture of this size (width, height)."""
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    columns = image.resize(
        (size[0], image.height), Image.Resampling.BILINEAR, box=(x0, 0, x1, image.height)
    )
    return columns.resize(size, Image.Resampling.BILINEAR, box=(0, y0, size[0], y1))
