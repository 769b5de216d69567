"""Plots and printed maps say what was measured: white is no effect, whichever way a metric runs."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from torch import Tensor

from blip_trace import TraceResult
from blip_trace.sites import patch_groups
from blip_trace.terminal import print_trace, render_map, strongest_cells

MAP = ("text_encoder", "hidden")
WORDS = ("[CLS]", "what", "?")
TWO_WORDS = {"stack_tokens": {"text_encoder": ("a", "b")}, "positions": {"text_encoder": (0, 1)}}
GAIN = torch.tensor([[0.0, 0.1, 0.2], [0.0, 0.5, 0.9], [0.0, -0.2, 0.3]])  # of the answer, [tokens, layers]

WAYS: dict[str, dict[str, Any]] = {
    "rising": {"lows": 0.1, "high": 1.1, "sign": 1},
    "falling": {"lows": 1.1, "high": 0.1, "sign": -1, "metric": "kl_divergence"},
    "noising": {"lows": 0.1, "high": 1.1, "sign": -1, "direction": "noise"},
    "falling noising": {
        "lows": 1.1,
        "high": 0.1,
        "sign": 1,
        "metric": "kl_divergence",
        "direction": "noise",
    },
}
"""sign: which way the metric goes in a cell that has an effect."""


def make(restored: dict[tuple[str, str], Tensor], lows: Tensor, high: float, **fields: Any) -> TraceResult:
    given: dict[str, Any] = {
        "stack_tokens": {"text_encoder": WORDS},
        "positions": {"text_encoder": tuple(range(len(WORDS)))},
        "question": "what ?",
        "answer": "red",
        "answer_ids": (11,),
        **fields,
    }
    return TraceResult(restored=restored, low_scores=lows, high_score=high, **given)


def trace(way: str, samples: int = 2, **fields: Any) -> TraceResult:
    """A trace whose cells have the effects GAIN, of a metric that runs `way`."""
    about = WAYS[way]
    noising = about.get("direction") == "noise"
    none = about["high"] if noising else about["lows"]
    maps = (none + about["sign"] * GAIN).repeat(samples, 1, 1)
    return make(
        {MAP: maps},
        torch.full((samples,), about["lows"]),
        about["high"],
        **{
            "metric": about.get("metric", "probability"),
            "settings": {"direction": "noise"} if noising else {},
            **fields,
        },
    )


def vision(side: int, block: int, layers: int, **fields: Any) -> TraceResult:
    """A trace of the vision stack in which only the last block matters, in the last layer."""
    groups = patch_groups(side, block)
    maps = torch.full((2, len(groups), layers), 0.1)
    maps[:, -1, -1] = 0.9
    return make(
        {("vision", "hidden"): maps},
        torch.tensor([0.1, 0.1]),
        0.9,
        **{
            "stack_tokens": {"vision": tuple(groups)},
            "positions": {"vision": tuple(group[0] for group in groups.values())},
            "settings": {"patch_group": block},
            "picture": torch.full((16, 16, 3), 128, dtype=torch.uint8),
            **fields,
        },
    )


def mesh(axes: Axes) -> QuadMesh:
    (found,) = (drawn for drawn in axes.collections if isinstance(drawn, QuadMesh))
    return found


def texts(figure: Figure) -> str:
    """All that is written above the drawing."""
    return "\n".join(text.get_text() for text in figure.axes[0].texts).replace("\N{NBSP}", " ")


def crossed(axes: Axes) -> set[tuple[int, int]]:
    """Rows and layers of the cells that a stroke goes through."""
    (strokes,) = axes.lines
    return {(int(y), int(x)) for x, y in np.asarray(strokes.get_xydata())}


def panels(figure: Figure) -> list[Axes]:
    return figure.axes[:-1]  # the last is the colour bar


@pytest.mark.parametrize("way", WAYS)
def test_white_is_no_effect(way: str) -> None:
    """Not the smallest number: a divergence is large, a noised answer probable where nothing happened."""
    shown = mesh(trace(way).plot(*MAP).axes[0])
    low, high = shown.get_clim()
    assert low is not None
    assert high is not None
    assert low < high
    brightness = shown.to_rgba(np.asarray(shown.get_array()))[..., :3].mean(-1)
    assert (brightness[GAIN.numpy() <= 0] > 0.95).all()  # an effect the wrong way is white too
    order = GAIN.clamp(min=0).flatten().argsort().numpy()
    assert (np.diff(brightness.flatten()[order]) <= 1e-6).all()  # and the larger, the darker
    assert brightness.flatten()[order[-1]] < 0.5


@pytest.mark.parametrize(("way", "extend"), [("rising", "min"), ("falling", "max"), ("noising", "max")])
def test_the_colour_bar_points_to_where_cells_go_beyond_no_effect(way: str, extend: str) -> None:
    bar = mesh(trace(way).plot(*MAP).axes[0]).colorbar
    assert bar is not None
    assert bar.extend == extend


def test_a_plot_names_its_metric_and_the_token_of_the_answer() -> None:
    """Where the answer has several; a token from the end on by its place from the start."""
    result = trace("falling")
    figure = result.plot(*MAP)
    assert figure.axes[1].get_xlabel() == "KL(clean || run)"  # below: three rows are too few beside
    assert "KL(clean || run): corrupted 1.1, clean 0.1 (2 samples)" in texts(figure)
    one = trace("falling", answer_ids=(11, 12), answer_token=-1)
    for drawn in (one.plot(*MAP), one.plot(*MAP, level=0.9)):
        assert "token 1 of the answer" in texts(drawn)
    assert "token" not in texts(trace("falling", answer_token=0).plot(*MAP))


def test_long_titles_stay_above_the_map(tmp_path: Path) -> None:
    """And beside a colour bar the label is broken: nothing widens the picture much beyond the map."""
    rows = tuple("abcdef")
    result = make(
        {MAP: torch.rand(2, 6, 2)},
        torch.tensor([0.1, 0.2]),
        0.9,
        stack_tokens={"text_encoder": rows},
        positions={"text_encoder": tuple(range(6))},
        metric="logit_difference",
        answer_ids=(1, 2),
        answer_token=1,
        question="what " * 20,
        settings={"window": 3},
    )
    figure = result.plot(*MAP, tmp_path / "map.png", level=0.95)
    assert "\n" in figure.axes[1].get_ylabel()
    with PIL.Image.open(tmp_path / "map.png") as image:
        assert image.width < 1.05 * 200 * figure.get_size_inches()[0]


def test_cells_whose_interval_holds_no_effect_are_crossed() -> None:
    """These and no others, and only when a level is asked for."""
    effects = torch.tensor([[-0.3, 0.2, 0.0, -0.1], [0.1, 0.3, 0.0, -0.2], [0.4, 0.5, 0.0, -0.3]])
    result = make({MAP: 0.1 + effects.view(3, 2, 2)}, torch.full((3,), 0.1), 0.9, **TWO_WORDS)
    lower, upper = result.interval(*MAP, 0.9)
    figure = result.plot(*MAP, level=0.9)
    assert crossed(figure.axes[0]) == {(0, 0), (1, 0)}  # not the sure ones, whichever their sign
    assert torch.equal((lower <= 0) & (upper >= 0), torch.tensor([[True, False], [True, False]]))
    assert "crossed: 90 % interval holds no effect" in texts(figure)
    plain = result.plot(*MAP)
    assert not plain.axes[0].lines
    assert "crossed" not in texts(plain)


@pytest.mark.parametrize("token", [None, 0, -1])
def test_crossed_heads_are_those_of_the_token_that_is_shown(token: int | None) -> None:
    heads = ("text_encoder", "self_attn_head")
    samples = torch.full((2, 2, 3, 4), 0.1)  # samples, heads, tokens, layers
    samples[:, 1, 1, 2] = 0.8
    samples[:, 0, 2, 3] = 0.5
    result = make({heads: samples}, torch.tensor([0.1, 0.1]), 0.9)
    sure = {None: {(1, 2)}, 0: set(), -1: {(0, 3)}}[token]
    every = {(head, layer) for head in range(2) for layer in range(4)}
    assert crossed(result.plot(*heads, token=token, level=0.95).axes[0]) == every - sure


def test_cells_done_exactly_are_dotted() -> None:
    """Of a screened map, and of no other."""
    result = make({MAP: torch.rand(2, 2, 2)}, torch.tensor([0.1, 0.2]), 0.9, **TWO_WORDS)
    marks = torch.tensor([[True, False], [True, True]])
    figure = replace(result, exact={MAP: marks}).plot(*MAP)
    assert crossed(figure.axes[0]) == {(row, layer) for row, layer in marks.nonzero().tolist()}
    assert "dotted: done exactly; the others are estimates" in texts(figure)
    assert not result.plot(*MAP).axes[0].lines


def test_a_level_needs_samples_and_lies_between_0_and_1(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="single sample"):
        trace("rising", samples=1).plot(*MAP, tmp_path / "map.png", level=0.95)
    with pytest.raises(ValueError, match="between 0 and 1"):
        trace("rising").plot(*MAP, tmp_path / "map.png", level=95)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("side", "block", "edges"),
    [(8, 3, [0, 3, 6, 8]), (8, 4, [0, 4, 8]), (3, 1, [0, 1, 2, 3]), (8, 5, [0, 5, 8]), (4, 4, [0, 1])],
)
def test_blocks_lie_where_their_patches_are(side: int, block: int, edges: list[int]) -> None:
    """Smaller ones at the right and lower edge; a single one is the whole picture."""
    figure = vision(side, block, layers=2).plot_image()
    for axes in panels(figure):
        corners = np.asarray(mesh(axes).get_coordinates())  # [rows + 1, columns + 1, (x, y)]
        assert corners[0, :, 0].tolist() == edges
        assert corners[:, 0, 1].tolist() == edges
        assert list(axes.images[0].get_extent()) == [0, edges[-1], edges[-1], 0]
        assert axes.get_ylim() == (edges[-1], 0)  # rows from the top down
    values = np.asarray(mesh(panels(figure)[-1]).get_array())
    assert values.argmax() == values.size - 1  # the last block is at the lower right
    assert ("blocks of" in texts(figure)) is (block > 1)


@pytest.mark.parametrize(("falls", "none", "most"), [(False, 0.1, 0.9), (True, 3.0, 0.5)])
def test_the_picture_is_seen_where_there_is_no_effect(falls: bool, none: float, most: float) -> None:
    """And one scale holds for all panels and the class token's square, whichever way the metric runs."""
    maps = torch.full((2, 10, 3), none)
    maps[:, 5, 1], maps[:, 0, 2] = most, (none + most) / 2
    metric = "kl_divergence" if falls else "probability"
    result = vision(8, 3, 3, metric=metric)
    result = replace(result, restored={("vision", "hidden"): maps}, low_scores=maps[:, 0, 0])
    figure = result.plot_image()
    for layer, axes in enumerate(panels(figure)):
        shown = mesh(axes)
        assert shown.get_clim() == pytest.approx((min(none, most), max(none, most)))
        (square,) = axes.patches
        assert isinstance(square, Rectangle)
        assert square.get_facecolor() == pytest.approx(shown.to_rgba(maps[0, 0, layer].numpy()))
        assert "class" in [text.get_text() for text in axes.texts]
    alpha = shown.to_rgba(np.linspace(none, most, 9))[:, 3]
    assert alpha[0] == 0
    assert (np.diff(alpha) > 0).all()
    assert alpha[-1] > 0.8
    assert figure.axes[-1].get_ylabel() == ("KL(clean || run)" if falls else "P(answer)")


@pytest.mark.parametrize(("layers", "count", "columns"), [(1, 1, 1), (4, 4, 4), (7, 7, 4), (12, 12, 6)])
def test_a_panel_for_each_layer(layers: int, count: int, columns: int) -> None:
    """In at most six columns."""
    drawn = panels(vision(8, 4, layers).plot_image())
    assert [axes.get_title(loc="right") for axes in drawn] == [f"layer {layer}" for layer in range(count)]
    assert len({round(axes.get_position().x0, 6) for axes in drawn}) == columns


def test_the_layers_asked_for_are_shown_in_their_order() -> None:
    result = vision(8, 4, 5)
    drawn = panels(result.plot_image(layers=[4, 0]))
    assert [axes.get_title(loc="right") for axes in drawn] == ["layer 4", "layer 0"]
    assert np.asarray(mesh(drawn[0]).get_array()).max() == pytest.approx(0.9)
    for wrong in ([5], [-1], [True], [1.0], []):
        with pytest.raises(ValueError, match="layer"):
            result.plot_image(layers=wrong)  # type: ignore[arg-type]


def test_what_cannot_be_drawn_over_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    with pytest.raises(KeyError, match="'vision' was traced"):
        trace("rising").plot_image(path=path)
    with pytest.raises(KeyError, match="'mlp' in stack 'vision'"):
        vision(8, 4, 2).plot_image("mlp", path)
    with pytest.raises(ValueError, match="no picture"):
        vision(8, 4, 2, picture=None).plot_image(path=path)
    with pytest.raises(ValueError, match="cannot save"):
        vision(8, 4, 2).plot_image(path=path.with_suffix(".gif"))
    with pytest.raises(OSError, match="No such file"):
        vision(8, 4, 2).plot_image(path=tmp_path / "missing" / "map.png")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_pictures_are_written_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"map.{suffix}"
    vision(8, 3, 2).plot_image(path=str(path))
    assert path.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_says_when_the_total_effect_vanishes() -> None:
    figure = replace(vision(8, 4, 2), high_score=0.1).plot_image()
    (line,) = (text for text in figure.axes[0].texts if "vanishes" in text.get_text())
    assert line.get_color() == "firebrick"
    assert "vanishes" not in texts(vision(8, 4, 2).plot_image())


@pytest.mark.parametrize("way", WAYS)
def test_the_strongest_cells_are_those_with_the_largest_effect(way: str) -> None:
    result = trace(way)
    table = strongest_cells(result, *MAP)
    found = list(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
    assert [(str(name), layer) for name, layer in found[:3]] == [
        ("what (1)", "2"),
        ("what (1)", "1"),
        ("? (2)", "2"),
    ]
    assert next(iter(table.columns[3].cells)) == "90 %"


@pytest.mark.parametrize("way", WAYS)
def test_the_printed_map_is_white_where_there_is_no_effect(way: str) -> None:
    text = render_map(trace(way), *MAP)
    shades = [span.style.bgcolor.triplet for span in text.spans if getattr(span.style, "bgcolor", None)]  # type: ignore[union-attr]
    white = [shade is not None and tuple(shade) == (255, 255, 255) for shade in shades]
    assert white == (GAIN <= 0).flatten().tolist()


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [("log_probability", -12.3, "-12.30"), ("rank", 30522.0, "30522"), ("kl_divergence", 2.5, "2.50")],
)
def test_printed_numbers_of_other_metrics_keep_their_columns(metric: str, value: float, shown: str) -> None:
    """Negative ones, and ranks among thirty thousand words: a layer stands above its numbers."""
    maps = torch.full((2, 3, 4), value)
    maps[:, 0, 0] = 1.0
    result = make({MAP: maps}, torch.full((2,), value), 1.0, metric=metric)
    _, layers, *rows = render_map(result, *MAP).plain.splitlines()
    for row in rows:
        ends = [number.end() for number in re.finditer(r"-?[\d.]+", row)]
        assert ends == [layers.index(str(layer)) + 2 for layer in range(4)]
    assert rows[1].count(shown) == 4


def test_all_that_is_printed_names_the_metric() -> None:
    printed = StringIO()
    print_trace(Console(file=printed, width=200), trace("falling"))
    text = printed.getvalue()
    assert "P(answer)" not in text
    for part in (
        "clean      KL(clean || run) = 0.1",
        "hidden: KL(clean || run) with",
        "layer  KL(clean || run)",
    ):
        assert part in text
