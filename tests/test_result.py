"""What a trace returns: numbers guarded, files whole or not at all, pictures of any shape."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from rich.console import Console

from blip_trace import TraceResult
from blip_trace.metrics import Measured
from blip_trace.terminal import print_trace

MAP = ("text_encoder", "hidden")
LAST = ("text_decoder", "hidden")


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


def make_measured() -> TraceResult:
    """Two maps, in the order of computation, by three metrics of an answer of two tokens, and a picture."""
    generator = torch.Generator().manual_seed(1)
    samples, cells, tokens = 3, 3 * 4 + 2 * 4, 2
    measured = {
        metric: Measured(
            cells=torch.rand(samples, cells, tokens, generator=generator),
            low=torch.rand(samples, tokens, generator=generator),
            high=torch.rand(tokens, generator=generator),
        )
        for metric in ("logit_difference", "probability", "rank")
    }
    labels = {"text_encoder": ("[CLS]", "what", "?"), "text_decoder": ("[DEC]", "dark")}
    unset = TraceResult(
        restored={MAP: torch.zeros(samples, 3, 4), LAST: torch.zeros(samples, 2, 4)},
        low_scores=torch.zeros(samples),
        high_score=0.0,
        stack_tokens=labels,
        positions={stack: tuple(range(len(names))) for stack, names in labels.items()},
        question="what ?",
        answer="dark red",
        answer_ids=(10, 11),
        settings={"window": 1},
        measured=measured,
        picture=torch.randint(256, (6, 8, 3), dtype=torch.uint8, generator=generator),
    )
    return unset.by("probability")


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
    none, most = result.color_range(*MAP)
    assert none == result.high_score
    assert most == pytest.approx(float(grid.min()))
    assert "that state corrupted" in printed(result)


def test_another_metric_of_the_same_trace() -> None:
    result = make_measured()
    for metric, joined in (
        ("probability", lambda values: values.prod(-1)),
        ("logit_difference", lambda values: values.sum(-1)),
        ("rank", lambda values: values.amax(-1)),
    ):
        own = result.measured[metric]
        for token in (None, 0, 1, -1):
            join = joined if token is None else lambda values, token=token: values[..., token]
            shown = result.by(metric, token)
            assert (shown.metric, shown.answer_token) == (metric, token)
            assert torch.equal(shown.samples(*MAP), join(own.cells)[:, :12].view(3, 3, 4))
            assert torch.equal(shown.samples(*LAST), join(own.cells)[:, 12:].view(3, 2, 4))
            assert torch.equal(shown.low_scores, join(own.low))
            assert shown.high_score == float(join(own.high))
            torch.testing.assert_close(
                shown.indirect_effect(*LAST), (shown.samples(*LAST) - join(own.low)[:, None, None]).mean(0)
            )
    assert result.by("rank").by("probability").to_dict() == result.to_dict()
    assert result.to_dict()["metrics"] == ["logit_difference", "probability", "rank"]


def test_a_metric_or_a_token_that_is_not_there() -> None:
    result = make_measured()
    with pytest.raises(KeyError, match="'logit' was not measured: there are logit_difference, probability"):
        result.by("logit")
    for token in (2, -3):
        with pytest.raises(ValueError, match=f"the answer has no token {token}: it has 2"):
            result.by("rank", token)


def test_colors_run_to_the_largest_effect_of_a_metric_that_falls() -> None:
    result = make(metric="kl_divergence", lows=(2.0, 3.0), high=0.0)
    none, most = result.color_range(*MAP)
    assert none == pytest.approx(2.5)
    assert most == pytest.approx(float(result.grid(*MAP).min()))
    noised = make(metric="kl_divergence", lows=(2.0, 3.0), high=0.0, settings={"direction": "noise"})
    none, most = noised.color_range(*MAP)
    assert none == 0
    assert most == pytest.approx(float(noised.grid(*MAP).max()))


def test_colors_do_not_blow_up_noise() -> None:
    flat = torch.full((3, 3, 4), 0.21)
    for settings, ends in (({}, (0.2, 0.2 + 0.7 / 4)), ({"direction": "noise"}, (0.9, 0.21))):
        assert make(restored={MAP: flat}, settings=settings).color_range(*MAP) == pytest.approx(ends)


def test_errors_and_intervals_are_of_the_effect() -> None:
    """Not of the metric: samples that start lower end lower too."""
    lows = (0.1, 0.3, 0.5, 0.2)
    restored = torch.tensor(lows)[:, None, None].expand(4, 3, 4) + 0.25
    result = make(lows=lows, restored={MAP: restored})
    assert result.standard_error(*MAP).max() < 1e-6
    lower, upper = result.interval(*MAP)
    torch.testing.assert_close(lower, torch.full((3, 4), 0.25))
    torch.testing.assert_close(upper, torch.full((3, 4), 0.25))
    noised = make(lows=lows, restored={MAP: restored}, settings={"direction": "noise"})
    assert noised.standard_error(*MAP).min() > 0.01
    with pytest.raises(ValueError, match="a single sample has no interval"):
        make(lows=(0.1,)).interval(*MAP)


def test_maps_are_compared_by_their_effects() -> None:
    samples = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(2)) / 2
    lows = (0.1, 0.2, 0.15, 0.05, 0.1)
    updates = ("text_encoder", "mlp")
    one = make(lows=lows, restored={MAP: samples, updates: samples + 0.125}, high=0.9)
    lifted = tuple(low + 0.25 for low in lows)
    shifted = make(lows=lifted, restored={MAP: samples + 0.25}, high=0.9)

    same = one.compare(*MAP, shifted)
    assert same.difference.abs().max() < 1e-6
    kinds = one.compare(*MAP, other_kind="mlp")
    torch.testing.assert_close(kinds.difference, torch.full((3, 4), -0.125))
    assert (kinds.p_value == 2 / 2**5).all()
    torch.testing.assert_close(
        one.compare(*MAP, shifted, normalized=True).difference,
        one.normalized(*MAP) - shifted.normalized(*MAP),
    )
    with pytest.raises(ValueError, match="compare with another trace, another kind, or both"):
        one.compare(*MAP)
    with pytest.raises(ValueError, match="a vanishing total effect cannot be divided by"):
        one.compare(*MAP, make(lows=lows, high=0.12), normalized=True)
    with pytest.raises(ValueError, match="maps of other shapes cannot be compared"):
        one.compare(*MAP, make())
    with pytest.raises(KeyError, match="no map of kind 'cross_attn'"):
        one.compare(*MAP, other_kind="cross_attn")


def test_a_map_of_heads(tmp_path: Path) -> None:
    heads = ("text_encoder", "cross_attn_head")
    samples = torch.full((3, 2, 3, 4), 0.2)  # heads, tokens, layers
    samples[:, 1, 2, 3] = 0.8
    result = make(restored={heads: samples}, positions={"text_encoder": (4, 6, 8)})
    grid, rows, where, _ = result.view(*heads)
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


def test_of_heads_those_with_the_largest_effect_are_shown_also_by_a_metric_that_falls() -> None:
    heads = ("text_encoder", "cross_attn_head")
    samples = torch.full((3, 2, 3, 4), 5.0)  # heads, tokens, layers
    samples[:, 1, 2, 3] = 0.1  # brings nearly all of the answer back
    result = make(restored={heads: samples}, metric="kl_divergence", lows=(5.0, 5.0, 5.0), high=0.0)
    assert result.view(*heads).where == " at '?' (2)"
    noised = make(
        restored={heads: 5.1 - samples},
        metric="kl_divergence",
        lows=(5.0, 5.0, 5.0),
        high=0.0,
        settings={"direction": "noise"},
    )
    assert noised.view(*heads).where == " at '?' (2)"


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


def test_round_trip_of_several_metrics_and_a_picture(tmp_path: Path) -> None:
    """Also where the file orders the maps in another way than they were computed."""
    path = tmp_path / "trace.safetensors"
    result = make_measured().by("logit_difference", 1)
    result.save(path)
    loaded = TraceResult.load(path)
    assert loaded.to_dict() == result.to_dict()
    assert (loaded.metric, loaded.answer_token) == ("logit_difference", 1)
    assert loaded.picture is not None
    assert torch.equal(loaded.picture, result.picture)
    assert list(loaded.measured) == list(result.measured)
    for metric in result.measured:
        for token in (None, 0, 1):
            own, shown = loaded.by(metric, token), result.by(metric, token)
            assert own.to_dict() == shown.to_dict()
            assert torch.equal(own.low_scores, shown.low_scores)
            for name in (MAP, LAST):
                assert torch.equal(own.samples(*name), shown.samples(*name))


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
