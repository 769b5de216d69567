"""Images from files and from callers: checked before they are decoded, then made RGB.

The pixels are those of transformers' own pipeline (`image_utils.load_image`: EXIF orientation applied, then
`convert("RGB")`), so results equal it: palettes and CMYK are converted, transparency is dropped and shows the
colours stored under it, and of an animation the first frame is taken. One case differs: 16-bit grey, which
`convert` alone clips to white, is scaled to 8 bits.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from os import fstat
from pathlib import Path

import PIL.Image
from PIL import ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 40_000_000


def open_image(
    source: str | Path | PIL.Image.Image, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Open an image file, or take a PIL image, as RGB; the caller's image is not changed.

    max_bytes: size of the largest file that is read.
    max_pixels: width x height of the largest image; it is checked before anything is decoded, so that a small
        file that unpacks to gigabytes (a decompression bomb) costs nothing.

    Raises FileNotFoundError for a missing file, OSError for one that cannot be read, ValueError for a folder,
    for anything but a whole image of `FORMATS` within both limits, and for values whose range is unknown
    (PIL's modes I and F), TypeError for other sources.
    """
    if isinstance(source, PIL.Image.Image):
        return _decode(source, "the image", max_pixels)
    if not isinstance(source, str | Path):
        raise TypeError(f"an image must be a PIL image or a path, not {type(source).__name__}")
    path = Path(source)
    return decode_image(read_file(path, max_bytes), str(path), max_bytes=max_bytes, max_pixels=max_pixels)


def decode_image(
    data: bytes, name: str, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Decode the bytes of an image file as `open_image` does; `name`: what errors call it.

    Raises ValueError for anything but a whole image of `FORMATS` within both limits.
    """
    check_size(len(data), name, max_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            image = PIL.Image.open(BytesIO(data), formats=FORMATS)
        except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
            raise ValueError(f"{name} has more than {_mega(max_pixels)} megapixels") from None
        except UnidentifiedImageError:
            raise ValueError(f"{name} is no image of a known format ({', '.join(FORMATS)})") from None
        except Exception as error:  # a broken header: Pillow's readers raise nearly anything
            raise ValueError(f"{name} cannot be read as an image: {error}") from error
    return _decode(image, name, max_pixels)


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """All bytes of a regular file: opening a pipe or a device could wait or go on for ever.

    Raises FileNotFoundError for a missing file, OSError for one that cannot be read, and ValueError for a
    folder, for no regular file, and for one that is empty or larger than `max_bytes`.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image file")
    if not path.exists():
        raise FileNotFoundError(f"there is no image file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        check_size(fstat(file.fileno()).st_size, str(path), max_bytes)
        data = file.read(max_bytes + 1)
    check_size(len(data), str(path), max_bytes)  # it may have changed since
    return data


def check_size(size: int, name: str, max_bytes: int = MAX_BYTES) -> None:
    """Raises ValueError for an image file of no bytes or of too many."""
    if not size:
        raise ValueError(f"{name} is an empty file")
    if size > max_bytes:
        raise ValueError(f"{name} is larger than {max_bytes / 2**20:g} MiB")


def _decode(image: PIL.Image.Image, name: str, max_pixels: int) -> PIL.Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: its size is {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width} x {height} = {_mega(width * height)} megapixels, more than the "
            f"{_mega(max_pixels)} that are allowed"
        )
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has values of unknown range (mode {image.mode}): convert it to RGB first")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            upright = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return upright.convert("RGB")
    except Exception as error:  # truncated or hostile bytes: Pillow's decoders raise nearly anything
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _mega(pixels: int) -> str:
    return f"{pixels / 1e6:.4g}"
