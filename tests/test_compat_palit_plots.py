"""The notebooks' heatmaps: looks, labels, guarded normalisation, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_compat_palit import IMAGE, LAYERS, QUESTION, TOKENS, pair

from blip_trace.compat import palit
from blip_trace.compat.models import UnsupportedError
from blip_trace.compat.palit import attention
from blip_trace.result import VANISHING

WORDS = ["[CLS]", *QUESTION.split(), "[SEP]"]
VANISHES = "The total effect vanishes: this map shows nothing."


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Figures that were shown; all are closed at the end, and nothing of the style may be left."""
    matplotlib.use("Agg")
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    before = dict(matplotlib.rcParams)
    yield figures
    assert dict(matplotlib.rcParams) == before
    plt.close("all")


def made(rows: int = TOKENS, columns: int = 12, **entries: Any) -> dict[str, Any]:
    """A result as the notebooks themselves make it."""
    scores = torch.linspace(0.2, 0.9, rows * columns).view(rows, columns)
    usual = {
        "low_score": 0.3,
        "high_score": torch.tensor([0.8, 0.8]),
        "question": QUESTION,
        "answer": "circle",
    }
    return {"scores": scores, **usual, "correct_prediction": True, "block_name": "text_encoder", **entries}


def parts(figure: Figure) -> tuple[Axes, Axes]:
    """The map's axes and those of its colour bar."""
    axes, bar = figure.axes
    return axes, bar


def colors(figure: Figure) -> tuple[str, float, float]:
    """The map's colours and the values between which they run."""
    (mesh,) = parts(figure)[0].collections
    assert mesh.cmap is not None
    return mesh.cmap.name, mesh.norm.vmin, mesh.norm.vmax


def values(figure: Figure) -> Any:
    """What is drawn, flat."""
    return parts(figure)[0].collections[0].get_array().ravel()


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def test_the_main_notebook_s_map(shown: list[Figure]) -> None:
    result = made()
    palit.plot_trace_heatmap(result)
    (figure,) = shown
    axes, bar = parts(figure)
    assert colors(figure) == ("Purples", 0.0, pytest.approx((0.9 - 0.3) / 0.5))
    assert np.allclose(values(figure), ((result["scores"] - 0.3) / 0.5).flatten())
    assert figure.get_size_inches().tolist() == [3.5, 2.0]
    assert figure.dpi == 200
    assert axes.get_title() == "Impact of restoring text_encoder after corrupted input"
    assert axes.yaxis_inverted()
    assert texts(axes.get_yticklabels()) == WORDS
    assert axes.get_yticks().tolist() == [row + 0.5 for row in range(TOKENS)]
    assert texts(axes.get_xticklabels()) == [str(layer) for layer in range(12)]  # the last one too
    assert axes.get_xlabel() == "layer"
    assert bar.get_ylabel() == "normalized effect, p(circle)"


def test_the_attention_notebook_s_map(shown: list[Figure]) -> None:
    attention.plot_trace_heatmap(made(1, block_name="text_decoder", kind=None))
    (figure,) = shown
    axes, bar = parts(figure)
    assert colors(figure) == ("Reds", pytest.approx(0.3), pytest.approx(0.9))
    assert values(figure).min() == pytest.approx(0.2)
    assert texts(axes.get_yticklabels()) == ["[DEC]"]
    assert bar.get_ylabel() == "p(circle)"


@pytest.mark.parametrize(("kind", "color"), [("attention", "Greens"), ("crossattention", "Blues")])
def test_maps_of_kinds(shown: list[Figure], kind: str, color: str) -> None:
    attention.plot_kindtrace_heatmap(made(kind=kind))
    (figure,) = shown
    axes, bar = parts(figure)
    assert colors(figure) == (color, pytest.approx(0.3), pytest.approx(0.9))
    assert axes.get_title() == f"Impact of restoring {kind} layers in text_encoder after corrupted input"
    assert texts(axes.get_yticklabels()) == WORDS
    assert axes.get_xlabel() == "middle one of the restored layers"
    assert bar.get_ylabel() == "p(circle)"


def test_any_differences(shown: list[Figure]) -> None:
    for block, color, rows in (("text_encoder", "Purples", TOKENS), ("text_decoder", "Blues", 1)):
        differences = torch.linspace(-0.1, 1, rows * 12).view(rows, 12).requires_grad_()
        palit.plot_map(made(block_name=block), differences)
        assert colors(shown[-1]) == (color, 0.0, pytest.approx(1))
        assert parts(shown[-1])[1].get_ylabel() == "effect, p(circle)"
    palit.plot_map(made(), np.full((TOKENS, 12), np.nan))
    assert VANISHES in parts(shown[-1])[0].get_title()


def averages(start: int = 0) -> dict[str, Any]:
    encoder = torch.linspace(0.2, 0.9, TOKENS * 12).view(TOKENS, 12)
    decoder = torch.linspace(0.4, 0.8, 12 - start)[None]
    return dict(differences_TE=encoder, low_score_TE=0.3, differences_DE=decoder, low_score_DE=0.5)


def test_averages(shown: list[Figure]) -> None:
    palit.avgnormal_heatmap(averages(), "Question Encoder")
    assert colors(shown[-1]) == ("Purples", 0.0, pytest.approx(0.6))
    axes, bar = parts(shown[-1])
    assert texts(axes.get_yticklabels()) == ["[CLS]", *(f"Q_token_{n}" for n in range(1, 8)), "[SEP]"]
    assert bar.get_ylabel() == "average effect"
    palit.avgnormal_heatmap(averages(1), "Answer Decoder", start=1)
    assert colors(shown[-1]) == ("Reds", 0.0, pytest.approx(0.3))
    axes, _ = parts(shown[-1])
    assert texts(axes.get_yticklabels()) == ["[DEC]"]
    assert texts(axes.get_xticklabels()) == [str(layer) for layer in range(1, 12)]
    palit.avg_heatmap(averages(), "Answer Decoder")
    assert colors(shown[-1]) == ("Reds", 0.5, pytest.approx(0.8))
    assert parts(shown[-1])[1].get_ylabel() == "average probability"


def test_averages_of_kinds(shown: list[Figure]) -> None:
    """The attention notebook keeps both of the encoder's kinds under TE and DE."""
    encoder = averages()["differences_TE"]
    kept = {**averages(), "differences_DE": encoder * 2, "low_score_DE": 0.6}
    for kind, color, most in (("Attention", "Greens", 0.6), ("CrossAttention", "Blues", 1.2)):
        attention.avgnormal_heatmap(kept, "Question Encoder", kind)
        assert colors(shown[-1]) == (color, 0.0, pytest.approx(most))
        title = f"Impact of restoring {kind.lower()} layers in text_encoder after corrupted input"
        assert parts(shown[-1])[0].get_title() == title
        assert len(parts(shown[-1])[0].get_yticklabels()) == TOKENS


class TestVanishingEffects:
    def test_nothing_is_divided_by_nothing(self, shown: list[Figure]) -> None:
        palit.plot_trace_heatmap(made(high_score=torch.tensor([0.3, 0.3])))
        assert parts(shown[0])[0].get_title().endswith(f"\n{VANISHES}")
        assert values(shown[0]).mask.all()
        assert colors(shown[0])[1:] == (0.0, 1.0)

    def test_unless_it_is_faithful(self, shown: list[Figure]) -> None:
        result = made(high_score=torch.tensor([0.301, 0.301]))
        palit.plot_trace_heatmap(result, faithful=True)
        assert VANISHES not in parts(shown[0])[0].get_title()
        assert values(shown[0]).max() == pytest.approx(600, rel=1e-3)
        palit.plot_trace_heatmap(
            made(high_score=torch.tensor([0.3, 0.3])), faithful=True
        )  # inf, and no error

    def test_probabilities_are_drawn_all_the_same(self, shown: list[Figure]) -> None:
        result = made(high_score=torch.tensor([0.3, 0.3]), kind="attention")
        attention.plot_trace_heatmap(result)
        attention.plot_kindtrace_heatmap(result)
        for figure in shown:
            assert parts(figure)[0].get_title().endswith(f"\n{VANISHES}")
            assert values(figure).max() == pytest.approx(0.9)

    @pytest.mark.parametrize(("share", "vanishes"), [(0.9, True), (1.1, False)])
    def test_a_plain_result_by_the_threshold_of_a_trace(
        self, shown: list[Figure], share: float, vanishes: bool
    ) -> None:
        high = 0.3 + share * VANISHING
        palit.plot_trace_heatmap(made(high_score=torch.tensor([high, high])))
        assert (VANISHES in parts(shown[0])[0].get_title()) is vanishes

    def test_samples_are_asked_where_there_are_some(self, shown: list[Figure]) -> None:
        """An effect below two standard errors, though above 0.01."""
        flow = palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder", samples=2)
        assert flow.trace is not None
        flow.trace.low_scores.copy_(torch.tensor([0.01, 0.95]))
        assert flow.trace.total_effect > 0.01
        palit.plot_trace_heatmap(flow)
        assert VANISHES in parts(shown[0])[0].get_title()

    def test_a_result_is_drawn_as_it_was_made(self, shown: list[Figure]) -> None:
        for options, lowest in (({}, 0.0), ({"notebook": "attention"}, None)):
            flow = palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder", **options)
            palit.plot_trace_heatmap(flow)
            expected = flow["low_score"] if lowest is None else lowest
            assert colors(shown[-1])[1] == pytest.approx(expected)
        faithful = palit.calculate_hidden_flow(
            *pair(), IMAGE, QUESTION, "text_encoder", notebook="attention", faithful=True
        )
        palit.plot_trace_heatmap(faithful)
        assert VANISHES not in parts(shown[-1])[0].get_title()


def test_what_lies_below_is_said(shown: list[Figure]) -> None:
    palit.plot_trace_heatmap(made())
    palit.plot_trace_heatmap(made(low_score=0.1))
    assert [len(parts(figure)[1].patches) for figure in shown] == [1, 0]  # the bar's pointed end
    palit.plot_trace_heatmap(made(low_score=0.95, high_score=torch.tensor([0.99, 0.99])))
    assert colors(shown[2])[1:] == (0.0, pytest.approx(1e-6))  # all of it below


def test_titles_and_labels(shown: list[Figure]) -> None:
    palit.plot_trace_heatmap(made(), None, "A title", "depth", "small $BLIP$")
    axes, bar = parts(shown[0])
    assert axes.get_title() == "A title (small $BLIP$)"
    assert axes.get_xlabel() == "depth"
    assert bar.get_ylabel() == "normalized effect, p(circle)"
    assert not axes.title.get_parse_math()


def test_labels_are_word_pieces_and_layers_of_the_result(shown: list[Figure]) -> None:
    asked = "what shape is at the bottom, left?"
    palit.plot_trace_heatmap(palit.calculate_hidden_flow(*pair(), IMAGE, asked, "text_encoder", samples=2))
    pieces = pair()[0].processor.tokenizer.convert_ids_to_tokens(
        pair()[0].processor.tokenizer(asked).input_ids
    )
    assert len(pieces) > len(asked.split()) + 2
    assert texts(parts(shown[0])[0].get_yticklabels()) == pieces
    flow = attention.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder", faithful=True)
    attention.plot_trace_heatmap(flow)
    assert texts(parts(shown[1])[0].get_xticklabels()) == [str(layer) for layer in range(1, LAYERS)]
    palit.plot_trace_heatmap(made(rows=5))  # words that are not those tokens
    assert texts(parts(shown[2])[0].get_yticklabels()) == list("01234")


def test_larger_maps_have_larger_figures(shown: list[Figure]) -> None:
    palit.plot_trace_heatmap(made(rows=18, columns=24))
    assert shown[0].get_size_inches().tolist() == [7.0, 4.0]


@pytest.mark.parametrize("suffix", ["pdf", "png", "svg"])
def test_saved(shown: list[Figure], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / "folder" / f"map.{suffix}"
    palit.plot_trace_heatmap(made(), str(path))
    assert path.read_bytes()[:5] in (b"%PDF-", b"\x89PNG\r", b"<?xml")
    assert not shown
    assert not plt.get_fignums()


def test_saved_beside_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    palit.avg_heatmap(averages(), "Question Encoder", "average.pdf")
    assert Path("average.pdf").exists()


class TestTracedAndDrawn:
    def test_blocks_of_the_main_notebook(self, shown: list[Figure], tmp_path: Path) -> None:
        """Returned; drawn only where there is a path."""
        result = palit.plot_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder")
        assert result is not None
        assert result["block_name"] == "text_decoder"
        every = palit.plot_all_flow(*pair(), IMAGE, QUESTION, str(tmp_path / "all.pdf"))
        assert every is not None
        assert every["scores"].shape == (TOKENS, LAYERS)
        palit.plot_average_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder", tmp_path / "average.png")
        assert not shown
        assert {path.name for path in tmp_path.iterdir()} == {"all.pdf", "average.png"}

    def test_blocks_of_the_attention_notebook(self, shown: list[Figure], tmp_path: Path) -> None:
        """Drawn, and nothing is returned; all of it is the decoder."""
        assert attention.plot_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder") is None
        assert colors(shown[0])[0] == "Purples"
        assert attention.plot_all_flow(*pair(), IMAGE, QUESTION) is None
        assert colors(shown[1])[0] == "Reds"
        attention.plot_all_flow(*pair(), IMAGE, QUESTION, str(tmp_path / "all.pdf"), faithful=True)
        assert len(shown) == 2
        assert (tmp_path / "all.pdf").exists()

    def test_kinds(self, shown: list[Figure], tmp_path: Path) -> None:
        assert attention.plotkind_all_flow(*pair(), IMAGE, QUESTION) is None
        assert [colors(figure)[0] for figure in shown] == ["Greens", "Blues"]
        attention.plotkind_all_flow(*pair(), IMAGE, QUESTION, str(tmp_path / "map.pdf"))
        attention.plot_kindavg_hidden_flow(
            *pair(), IMAGE, QUESTION, "text_encoder", "attention", tmp_path / "one.png"
        )
        names = {"map_attention.pdf", "map_crossattention.pdf", "one.png"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert len(shown) == 2
        palit.plot_kind_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder", "attention", samples=2)
        low = palit.trace_with_patch(*pair(), IMAGE, QUESTION, 22, [], samples=2)  # of noise, not of a factor
        assert colors(shown[2])[1] == pytest.approx(float(low), abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: palit.plot_trace_heatmap(made(), "map.jpg"), "cannot save a heatmap as 'map.jpg'"),
        (lambda: palit.plot_trace_heatmap(made(), "map"), "end it in .png, .pdf, .svg"),
        (lambda: palit.plot_trace_heatmap({}), "this result has no 'block_name'"),
        (lambda: palit.plot_trace_heatmap(made(block_name="vision")), "unknown block_name 'vision'"),
        (lambda: palit.plot_map(made(), torch.ones(3)), r"a map is \[tokens, layers\], not \[3\]"),
        (lambda: palit.plot_kindtrace_heatmap(made()), "this result has no 'kind'"),
        (lambda: palit.plot_kindtrace_heatmap(made(kind="mlp")), "unknown kind 'mlp'"),
        (lambda: palit.avgnormal_heatmap(averages(), "Encoder"), "unknown part 'Encoder'"),
        (lambda: palit.avgnormal_heatmap({}, "Answer Decoder"), "this result has no 'differences_DE'"),
        (
            lambda: attention.avgnormal_heatmap(averages(), "Answer Decoder", "Attention"),
            "unknown part 'Answer Decoder'",
        ),
        # as the notebook's own last cells call it, which fail there too
        (
            lambda: attention.avgnormal_heatmap(averages(), "Question Encoder", "/content/map.pdf"),
            "unknown kind '/content/map.pdf': choose among attention, crossattention",
        ),
    ],
)
def test_refused(call: Any, message: str, shown: list[Figure]) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not shown
    assert not plt.get_fignums()


def test_a_format_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="subject"):
        palit.plot_all_flow(*pair(), IMAGE, QUESTION, str(tmp_path / "map.jpg"), "shape")
    with pytest.raises(ValueError, match=r"map\.jpg"):
        palit.plot_hidden_flow(*pair(), IMAGE, "", "text_encoder", str(tmp_path / "map.jpg"))
