"""References to images: what they resolve to, and that nothing but local files below the root is read."""

from __future__ import annotations

import os
import pickle
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_trace import images
from blip_trace.images import decode_image, open_image
from blip_trace.scenes import random_scene
from blip_trace.sweep import media as media_module
from blip_trace.sweep.media import Media


def png(grey: int = 0) -> bytes:
    data = BytesIO()
    PIL.Image.new("RGB", (4, 3), (grey, grey, grey)).save(data, "PNG")
    return data.getvalue()


def refused(media: Media, reference: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        media.read(reference)
    assert "\n" not in str(error.value)
    assert not media.exists(reference)


def test_files(tmp_path: Path) -> None:
    """Names are relative to the root; what is missing is told as missing."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "ä b.png").write_bytes(png())
    media = Media(tmp_path)
    assert media.read("deep/ä b.png") == png()
    assert media.read("deep/../deep/ä b.png") == png()
    assert media.read(str(tmp_path / "deep" / "ä b.png")) == png()  # absolute, but below the root
    assert media.exists("deep/ä b.png")
    assert not media.exists("deep")
    assert not media.exists("missing.png")
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*missing\.png"):
        media.read("missing.png")


def test_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative root means the same after the working directory changes, and in another process."""
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    media = Media(Path("."))
    monkeypatch.chdir("/")
    assert media.read("a.png") == png()
    assert pickle.loads(pickle.dumps(media)).read("a.png") == png()
    assert pickle.loads(pickle.dumps(Media(tmp_path, absolute=True))).absolute


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "HTTPS://example.org/a.png",
        "s3://bucket/a.png",
        "s3:bucket",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "data:image/png;base64,AAAA",
        "hdfs://a/b",
        "https://example.org/a.parquet#image/0",
    ],
)
def test_urls(tmp_path: Path, url: str) -> None:
    """Nothing is fetched, with a root or without."""
    for media in (Media(tmp_path), Media(None), Media(tmp_path, absolute=True)):
        refused(media, url, "is a URL: images are read from local files")


@pytest.mark.parametrize("absolute", [False, True])
def test_escapes(tmp_path: Path, absolute: bool) -> None:
    """Neither names nor links lead out of the root."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root2").mkdir()
    for outside in (tmp_path / "secret.png", tmp_path / "root2" / "secret.png"):
        outside.write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "inside.png").write_bytes(png(1))
    (root / "good.png").symlink_to(root / "inside.png")
    media = Media(root, absolute)
    for name in (
        "../secret.png",
        "link.png",
        "folder/secret.png",
        "../root2/secret.png",
        "a/../../secret.png",
    ):
        refused(media, name, "leads out of the folder")
    assert media.read("good.png") == png(1)


def test_absolute_names(tmp_path: Path) -> None:
    """Absolute names count only where the user named no folder."""
    outside = tmp_path / "a.png"
    outside.write_bytes(png())
    (tmp_path / "root").mkdir()
    refused(Media(tmp_path / "root"), str(outside), "leads out of the folder")
    assert Media(None).read(str(outside)) == png()
    assert Media(tmp_path / "root", absolute=True).read(str(outside)) == png()
    refused(Media(None), "a.png", "is relative")


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, pipes, devices, circles of links and what is too large are refused without being read."""
    media = Media(tmp_path)
    (tmp_path / "folder.png").mkdir()
    refused(media, "folder.png", "is a folder")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    refused(media, "pipe.png", "no regular file")
    refused(Media(None), "/dev/zero", "no regular file")
    refused(media, "", "no name")
    refused(media, "a\0.png", "no name")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    assert not media.exists("circle.png")
    with pytest.raises((ValueError, OSError)):
        media.read("circle.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        media.read("empty.png")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        media.read("large.png")
    assert not media.exists("x" * 5000)
    with pytest.raises(OSError, match="too long"):
        media.read("x" * 5000)


def test_scenes() -> None:
    """A reference names the same scene on every machine."""
    media = Media(None)
    picture = decode_image(media.read("scene:7"), "scene")
    assert picture.size == (64, 64)
    assert picture.tobytes() == random_scene(Random(7)).render(64).tobytes()
    assert decode_image(media.read("scene:7@100"), "scene").size == (100, 100)
    assert media.exists("scene:7@100")
    refused(media, "scene:7@0", "pixels wide")
    refused(media, "scene:7@99999", "pixels wide")
    refused(media, "scene:-7", "relative")


def parquet(path: Path, rows: int = 10, group: int = 4, **columns: Any) -> None:
    struct = pa.array([{"bytes": png(row), "path": f"{row}.png"} for row in range(rows)])
    plain = pa.array([png(100 + row) for row in range(rows)], pa.large_binary())
    table = pa.table({"image": struct, "odd/name": plain, "question": ["?"] * rows, **columns})
    pq.write_table(table, path, row_group_size=group)


def test_cells(tmp_path: Path) -> None:
    """Structs as Hugging Face writes them and plain binary, in any order of rows."""
    parquet(tmp_path / "a.parquet")
    media = Media(tmp_path)
    for row in (9, 0, 4, 3, 8):
        assert media.read(f"a.parquet#image/{row}") == png(row)
        assert media.read(f"a.parquet#odd/name/{row}") == png(100 + row)
        assert media.exists(f"a.parquet#image/{row}")
    refused(media, "a.parquet#image/10", "has 10 rows")
    refused(media, "a.parquet#question/0", "no column 'question' of images")
    refused(media, "a.parquet#none/0", "no column")
    refused(media, "../a.parquet#image/0", "leads out")
    assert not media.exists("b.parquet#image/0")
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        media.read("b.parquet#image/0")


def test_bad_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Null, empty and large cells, large row groups, broken files: one sentence each."""
    column = pa.array([b"", None, b"12345", b"1"], pa.binary())
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    media = Media(tmp_path)
    for row, match in ((0, "empty"), (1, "is null")):
        with pytest.raises(ValueError, match=match):
            media.read(f"a.parquet#image/{row}")
    assert media.read("a.parquet#image/3") == b"1"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    refused(media, "b.parquet#image/0", r"b\.parquet is no whole Parquet file")
    monkeypatch.setattr(media_module, "MAX_GROUP_BYTES", 3)
    with pytest.raises(ValueError, match="write smaller ones"):
        Media(tmp_path).read("a.parquet#image/3")


def test_flipped_bits(tmp_path: Path) -> None:
    """Pages are checked against their checksums: a changed image is told, never shown."""
    column = pa.array([b"\x01" * 400], pa.binary())
    path = tmp_path / "a.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"image": column}), path, write_page_checksum=True, **options)
    data = bytearray(path.read_bytes())
    data[data.index(b"\x01" * 400) + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is broken"):
        Media(tmp_path).read("a.parquet#image/0")


def test_row_groups_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring rows are cheap, and few groups stay in memory."""
    parquet(tmp_path / "a.parquet", rows=40, group=4)
    media = Media(tmp_path)
    read: list[int] = []
    original = media_module._File.read
    monkeypatch.setattr(
        media_module._File,
        "read",
        lambda self, column, number: read.append(number) or original(self, column, number),
    )
    for row in range(40):
        media.read(f"a.parquet#image/{row}")
    assert read == list(range(10))
    assert len(media._groups) == media_module.CACHED_GROUPS
    monkeypatch.setattr(media_module, "CACHED_BYTES", 1)
    media.read("a.parquet#image/0")
    assert len(media._groups) == 1


def test_decoding_bytes_is_opening_a_file(tmp_path: Path) -> None:
    """`decode_image` gives the pixels and the refusals of `open_image`, under the name that it is told."""
    path = tmp_path / "a.png"
    path.write_bytes(png(9))
    assert decode_image(png(9), "cell").tobytes() == open_image(path).tobytes()
    for data, match in ((b"", "cell is an empty"), (b"<html>", "cell is no image")):
        with pytest.raises(ValueError, match=match):
            decode_image(data, "cell")
    with pytest.raises(ValueError, match="cell is larger than"):
        decode_image(png(), "cell", max_bytes=10)
    with pytest.raises(ValueError, match="cell has 4 x 3"):
        decode_image(png(), "cell", max_pixels=11)
