"""What a trace returns: numbers guarded, files whole or not at all, pictures of any shape."""

from __future__ import annotations

import json
import math
import struct
from io import StringIO
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from blip_trace import TraceResult
from blip_trace.result import FORMAT
from blip_trace.terminal import print_trace

MAP = ("text_encoder", "hidden")


def make(
    tokens: tuple[str, ...] = ("[CLS]", "what", "?"),
    layers: int = 4,
    lows: tuple[float, ...] = (0.1, 0.2, 0.3),
    high: float = 0.9,
    **fields: Any,
) -> TraceResult:
    generator = torch.Generator().manual_seed(0)
    shape = (len(lows), len(tokens), layers)
    given: dict[str, Any] = {
        "restored": {MAP: torch.rand(shape, generator=generator) * 0.8 + 0.1},
        "positions": {"text_encoder": tuple(range(len(tokens)))},
        "question": "what ?",
        "answer": "red",
        "answer_ids": (11,),
        "settings": {"window": 1},
        **fields,
    }
    labels = {"text_encoder": tokens}
    return TraceResult(low_scores=torch.tensor(lows), high_score=high, stack_tokens=labels, **given)


def printed(result: TraceResult, **options: Any) -> str:
    text = StringIO()
    print_trace(Console(file=text, width=200, **options), result)
    return text.getvalue()


def test_numbers() -> None:
    result = make()
    samples, grid = result.samples(*MAP), result.grid(*MAP)
    assert samples.shape == (3, 3, 4)
    assert grid.shape == (3, 4)
    assert torch.equal(grid, samples.mean(0))
    assert result.low_score == pytest.approx(0.2)
    assert result.total_effect == pytest.approx(0.7)
    torch.testing.assert_close(result.indirect_effect(*MAP), grid - 0.2)
    torch.testing.assert_close(result.normalized(*MAP), (grid - 0.2) / 0.7)
    assert not result.total_effect_vanishes
    assert result.standard_error(*MAP).isfinite().all()
    assert make(lows=(0.1,)).standard_error(*MAP).isnan().all()


def test_numbers_of_a_noising() -> None:
    result = make(settings={"direction": "noise"})
    grid = result.grid(*MAP)
    torch.testing.assert_close(result.indirect_effect(*MAP), 0.9 - grid)
    torch.testing.assert_close(result.normalized(*MAP), (0.9 - grid) / 0.7)
    low, high = result.color_range(*MAP)
    assert high == result.high_score
    assert low == pytest.approx(float(grid.min()))
    assert "that state corrupted" in printed(result)


def test_a_map_of_heads(tmp_path: Path) -> None:
    heads = ("text_encoder", "cross_attn_head")
    samples = torch.full((3, 2, 3, 4), 0.2)  # heads, tokens, layers
    samples[:, 1, 2, 3] = 0.8
    result = make(restored={heads: samples}, positions={"text_encoder": (4, 6, 8)})
    grid, rows, where = result.view(*heads)
    assert torch.equal(grid, samples.mean(0)[:, 2])  # at the token of the strongest head
    assert rows == ("head 0", "head 1")
    assert where == " at '?' (8)"
    assert torch.equal(result.view(*heads, token=0).grid, samples.mean(0)[:, 0])
    assert result.normalized(*heads)[1, 2, 3] == pytest.approx(6 / 7)
    assert "? (8), head 1" in printed(result)
    result.plot(*heads, tmp_path / "map.png", token=-3)
    result.save(tmp_path / "trace.safetensors")
    assert torch.equal(TraceResult.load(tmp_path / "trace.safetensors").samples(*heads), samples)
    with pytest.raises(ValueError, match="no token 3"):
        result.view(*heads, token=3)
    with pytest.raises(ValueError, match="no token can be chosen"):
        make().view(*MAP, token=0)


@pytest.mark.parametrize(
    ("lows", "high", "vanishes"),
    [
        ((0.5,), 0.5, True),
        ((0.5,), 0.505, True),
        ((0.5,), 0.6, False),
        ((0.6,), 0.5, False),  # the corruption helps: unusual, but an effect
        ((0.0, 0.9), 0.6, True),  # within two standard errors of the low score
        ((0.44, 0.46), 0.6, False),
    ],
)
def test_a_vanishing_total_effect_is_not_divided_by(
    lows: tuple[float, ...], high: float, vanishes: bool
) -> None:
    result = make(lows=lows, high=high)
    assert result.total_effect_vanishes is vanishes
    shares = result.normalized(*MAP)
    assert bool(shares.isnan().all()) is vanishes
    assert bool(shares.isfinite().all()) is not vanishes
    assert result.to_dict()["total_effect_vanishes"] is vanishes
    assert ("The total effect vanishes" in printed(result)) is vanishes
    texts = [text.get_text() for text in result.plot(*MAP).axes[0].texts]
    assert any("vanishes" in text for text in texts) is vanishes


def test_a_map_that_was_not_traced(tmp_path: Path) -> None:
    result = make()
    for call in (result.samples, result.grid, result.indirect_effect, result.normalized, result.plot):
        with pytest.raises(KeyError, match=r"no map of kind 'mlp' .* there are \('text_encoder', 'hidden'\)"):
            call("text_encoder", "mlp")
    with pytest.raises(KeyError, match="'vision' was not traced"):
        result.tokens("vision")


def test_round_trip(tmp_path: Path) -> None:
    result = make(question="was ist „rot“? 漢字", tokens=("a", "b\n", "[SEP]"), answer_ids=(3, 4))
    path = tmp_path / "trace.safetensors"
    result.save(path)
    loaded = TraceResult.load(str(path))
    assert torch.equal(loaded.samples(*MAP), result.samples(*MAP))
    assert torch.equal(loaded.low_scores, result.low_scores)
    assert loaded.to_dict() == result.to_dict()
    assert loaded.answer_ids == (3, 4)
    assert loaded.tokens("text_encoder") == ("a", "b\n", "[SEP]")
    assert [file.name for file in tmp_path.iterdir()] == ["trace.safetensors"]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["maps"]["text_encoder/hidden"]


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    make().save(path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for broken in (
        b"",
        b"\x80\x04pickle",
        whole[:20],
        whole[:-1],
        (2**62).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"{" * header,
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no saved trace"):
            TraceResult.load(path)
    with pytest.raises(FileNotFoundError):
        TraceResult.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    ["none", "no format", "no trace", "json", "type", "field", "places", "low", "shape", "heads", "name"],
)
def test_safetensors_that_are_no_trace(tmp_path: Path, change: str) -> None:
    path = tmp_path / "trace.safetensors"
    result = make()
    result.save(path)
    tensors = load_file(path)
    metadata = {"format": FORMAT, "trace": json.dumps(result._description())}
    match change:
        case "none":
            save_file(tensors, path, metadata)
            assert TraceResult.load(path).question == "what ?"
            return
        case "no format":
            del metadata["format"]
        case "no trace":
            del metadata["trace"]
        case "json":
            metadata["trace"] = "{"
        case "type":
            metadata["trace"] = "[]"
        case "field":
            metadata["trace"] = json.dumps({**result._description(), "tokens": 3})
        case "places":
            places = {"text_encoder": [0]}
            metadata["trace"] = json.dumps({**result._description(), "positions": places})
        case "heads":
            tensors["text_encoder/mlp"] = torch.zeros(3, 2, 3, 4)  # a map without heads that has some
        case "low":
            del tensors["low_scores"]
        case "shape":
            tensors["text_encoder/hidden"] = torch.zeros(2, 5)
        case "name":
            tensors["text_decoder/hidden"] = torch.zeros(3, 1, 4)  # its tokens have no labels
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="no saved trace"):
        TraceResult.load(path)


@pytest.mark.parametrize("name", ["missing/trace.safetensors", "file/trace.safetensors"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"No such file|Not a directory"):
        make().save(tmp_path / name)
    with pytest.raises(OSError, match=r"No such file|Not a directory"):
        make().plot(*MAP, path=(tmp_path / name).with_suffix(".png"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    make().plot(*MAP, path=path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        make(layers=7).plot(*MAP, path=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PNG"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"map.{suffix}"
    make().plot(*MAP, path=str(path))
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix.lower()]
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["map", "map.exe", "map.jpg.part"])
def test_a_picture_of_an_unknown_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot save a heatmap"):
        make().plot(*MAP, path=tmp_path / name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("tokens", "layers"), [(1, 1), (1, 48), (40, 1), (12, 12)])
def test_every_layer_and_token_is_labelled(tmp_path: Path, tokens: int, layers: int) -> None:
    names = tuple(f"word{i}" for i in range(tokens))
    figure = make(names, layers).plot(*MAP, path=tmp_path / "map.png")
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(layer) for layer in range(layers)]
    assert tuple(tick.get_text() for tick in axes.get_yticklabels()) == names
    assert axes.yaxis_inverted()
    with PIL.Image.open(tmp_path / "map.png") as image:
        assert max(image.size) < 4000


def test_odd_words(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Of markup, of mathematics, of a terminal, of a script that the font does not have."""
    words = ("[bold]", "$x$ $", "\x1b[31mred", "漢字", "a\nb", "")
    result = make(words, question="is it $5 or $6 \x07 [/] 漢?", answer="[red]")
    result.plot(*MAP, path=tmp_path / "map.png")
    assert not recwarn.list
    text = printed(result)
    assert "[bold]" in text
    assert "$x$ $" in text
    assert "[/]" in text
    assert not {"\x1b", "\x07"} & set(text)


def test_the_printed_map_can_be_read_without_colours() -> None:
    result = make()
    text = printed(result, color_system=None)
    for row in result.grid(*MAP).tolist():
        assert "  ".join(f"{p:.2f}" for p in row) in text
    peak = result.grid(*MAP).flatten().argmax().item()
    token, layer = divmod(int(peak), 4)
    strongest = text.split("strongest")[1].splitlines()[1].split()
    assert strongest[:3] == [result.tokens("text_encoder")[token], f"({token})", str(layer)]
    share = result.normalized(*MAP).max().item()
    assert strongest[4:] == [f"{100 * share:.0f}", "%"]
    assert not math.isnan(share)


def test_small_probabilities_keep_their_digits() -> None:
    """As those of a model with random weights and thirty thousand words."""
    result = make(lows=(2e-5, 3e-5, 1e-5), high=4e-5)
    small = TraceResult(**{**vars(result), "restored": {MAP: result.samples(*MAP) * 4e-5}})
    text = printed(small)
    assert "in units of 1e-4" in text
    assert f"{float(small.grid(*MAP).max()) / 1e-4:.2f}" in text
