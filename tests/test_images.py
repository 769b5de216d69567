"""Images that cannot be traced are refused in one sentence; those that can equal transformers' own."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers.image_utils import load_image

from blip_trace.images import open_image


@pytest.fixture
def noise() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, format: str) -> bytes:
    data = BytesIO()
    image.save(data, format)
    return data.getvalue()


def png(width: int, height: int, depth: int = 8, color: int = 2, body: bytes = b"") -> bytes:
    """A PNG of any claimed size around compressed `body`."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels in a few kilobytes."""
    deflate = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    body = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    return png(side, side, depth=1, color=0, body=body)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "LA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("GIF", "P"),
    ],
)
def test_pixels_are_those_of_transformers(
    noise: PIL.Image.Image, tmp_path: Path, format: str, mode: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(noise.convert("RGB").convert(mode) if mode != "RGBA" else noise, format))
    own = open_image(path)
    assert own.mode == "RGB"
    assert np.array_equal(own, load_image(str(path)))
    assert np.array_equal(own, open_image(str(path)))
    with PIL.Image.open(path) as image:
        assert np.array_equal(own, open_image(image))


def test_orientation_of_a_photograph_is_applied(noise: PIL.Image.Image, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / "photo.jpg"
    noise.convert("RGB").save(path, exif=exif)
    assert open_image(path).size == (30, 40)
    assert np.array_equal(open_image(path), load_image(str(path)))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = tmp_path / "animation.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    PIL.Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 100, 255]


def test_the_callers_image_is_not_changed(noise: PIL.Image.Image) -> None:
    before = noise.tobytes()
    opened = open_image(noise)
    assert noise.mode == "RGBA"
    assert noise.tobytes() == before
    assert opened is not noise


def broken_files(image: PIL.Image.Image) -> dict[str, bytes]:
    whole = encoded(image, "PNG")
    jpeg = encoded(image.convert("RGB"), "JPEG")
    tiff = encoded(image, "TIFF")
    return {
        "empty": b"",
        "text": b"<html>not an image</html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "tiff": tiff,
        "magic alone": whole[:8],
        "header alone": whole[:40],
        "half a png": whole[: len(whole) // 2],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "flipped bits": whole[:60] + bytes(255 - byte for byte in whole[60:90]) + whole[90:],
        "no pixels": png(0, 5),
        "no data": png(5, 5),
        "bad data": png(5, 5, body=b"\xff" * 20),
        "unknown depth": png(5, 5, depth=77),
    }


@pytest.mark.parametrize("case", list(broken_files(PIL.Image.new("RGB", (8, 8)))))
def test_broken_files(noise: PIL.Image.Image, tmp_path: Path, case: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(broken_files(noise)[case])
    with pytest.raises(ValueError, match=r"image\.png") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [6400, 13000, 20000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side))
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="megapixels"):
        open_image(path)
    with PIL.Image.open(BytesIO(bomb(6400))) as image, pytest.raises(ValueError, match="megapixels"):
        open_image(image)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_limits(noise: PIL.Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    noise.save(path)
    assert open_image(path, max_pixels=40 * 30, max_bytes=path.stat().st_size).size == (40, 30)
    with pytest.raises(ValueError, match="megapixels"):
        open_image(path, max_pixels=40 * 30 - 1)
    with pytest.raises(ValueError, match="larger than"):
        open_image(path, max_bytes=path.stat().st_size - 1)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="is a folder"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(ValueError, match="no regular file"):
        open_image(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        open_image("/dev/zero")
    with pytest.raises(FileNotFoundError):
        open_image("https://example.org/cat.jpg")


@pytest.mark.parametrize("source", [None, 3, b"bytes", np.zeros((4, 4, 3), np.uint8)])
def test_wrong_types(source: object) -> None:
    with pytest.raises(TypeError, match="an image must be a PIL image or a path"):
        open_image(source)  # type: ignore[arg-type]


def test_images_without_a_known_range_or_pixels() -> None:
    for image in (PIL.Image.new("F", (4, 4)), PIL.Image.new("I", (4, 4))):
        with pytest.raises(ValueError, match="unknown range"):
            open_image(image)
    with pytest.raises(ValueError, match="no pixels"):
        open_image(PIL.Image.new("RGB", (0, 5)))


def test_memory_of_a_bomb_in_a_fresh_process(tmp_path: Path) -> None:
    """Under a limit that its decoding would break, the refusal still is one sentence."""
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(13000))
    script = (
        "import resource, sys, types\n"
        "package = types.ModuleType('blip_trace'); package.__path__ = [sys.argv[2]]\n"  # without torch
        "sys.modules['blip_trace'] = package\n"
        "from blip_trace.images import open_image\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (100 * 2**20,) * 2)\n"
        "try:\n    open_image(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
    )
    package = Path(open_image.__code__.co_filename).parent
    done = subprocess.run(
        [sys.executable, "-c", script, path, package], capture_output=True, text=True, check=True, timeout=60
    )
    assert "megapixels" in done.stdout
