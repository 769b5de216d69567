"""What ROME's functions read, write and draw: tokens, noise by its code, npz cases, heatmaps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from test_compat_rome import IMAGE, QUESTION, SUBJECT, batch, mt
from torch import Tensor

from blip_trace.compat import rome
from blip_trace.compat.rome import trace as rome_trace

# Tokens


@pytest.mark.parametrize(
    ("substring", "expected"),
    [
        ("bottom center", (6, 8)),
        ("Bottom  CENTER", (6, 8)),
        ("what", (1, 2)),
        ("shape is", (2, 4)),
        (QUESTION, (1, 8)),
    ],
)
def test_the_range_of_a_subject(substring: str, expected: tuple[int, int]) -> None:
    ids = batch()["input_ids"][0]
    assert rome.find_token_range(mt().tokenizer, ids, substring) == expected


def test_ranges_of_word_pieces() -> None:
    """`circles` is circle and ##s."""
    tokenizer = mt().tokenizer
    ids = tokenizer("how many circles are there in the picture").input_ids
    assert rome.decode_tokens(tokenizer, ids)[3:5] == ["circle", "##s"]
    assert rome.find_token_range(tokenizer, ids, "circles") == (3, 5)
    assert rome.find_token_range(tokenizer, torch.tensor(ids), "circle") == (3, 4)
    assert rome.find_token_range(tokenizer, ids, "the") == (6, 7)  # in `there`, as ROME finds it
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        rome.find_token_range(tokenizer, ids, "zebra")
    for missing in ("star", "", "circles circle"):
        with pytest.raises(ValueError, match="does not occur in the question"):
            rome.find_token_range(tokenizer, ids, missing)
    assert rome.decode_tokens(tokenizer, torch.tensor([ids[:2], ids[1:3]])) == [
        ["[CLS]", "how"],
        ["how", "many"],
    ]


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The Space Needle is in", "The Space Needle"),
        ("What is the Eiffel Tower?", "Eiffel Tower"),
        ("Where Is It", "Is It"),
        ("in what city is Big Ben", "Big Ben"),
        ("Whatever It Takes", "Whatever It Takes"),
        ("Vinson Massif's height", "Vinson Massif's"),
    ],
)
def test_guessed_subjects(prompt: str, subject: str) -> None:
    assert rome.guess_subject(prompt) == subject


def test_a_subject_that_cannot_be_guessed() -> None:
    with pytest.raises(ValueError, match="no subject can be guessed"):
        rome.guess_subject(QUESTION)
    with pytest.raises(ValueError, match="no subject can be guessed"):
        rome.plot_hidden_flow(mt(), QUESTION, image=IMAGE)


# Noise


def words_of(*texts: str) -> Tensor:
    table = mt().model.text_encoder.embeddings.word_embeddings.weight.detach().double()
    return table[[i for text in texts for i in mt().tokenizer(text, add_special_tokens=False).input_ids]]


def test_the_standard_deviation_of_words() -> None:
    found = rome.collect_embedding_std(mt(), ["red circle", "star"])
    assert found == pytest.approx(float(words_of("red circle", "star").std()))
    with pytest.raises(ValueError, match="at least two tokens"):
        rome.collect_embedding_std(mt(), [])


def test_the_gaussian_has_the_words_mean_and_covariance() -> None:
    texts = (QUESTION, "how many red stars are there")
    words = words_of(*texts)
    transform = rome.collect_embedding_gaussian(mt(), questions=texts)
    made = transform(torch.randn(200_000, words.shape[1], dtype=torch.float64))
    assert (made.mean(0) - words.mean(0)).abs().max() < 5e-3
    wanted = torch.cov(words.T)
    assert (torch.cov(made.T) - wanted).norm() < 0.02 * wanted.norm()


def test_student_s_t_is_the_gaussian_times_a_factor_for_each_token() -> None:
    gaussian = rome.collect_embedding_gaussian(mt(), questions=[QUESTION])
    transform = rome.collect_embedding_tdist(mt(), 4, questions=[QUESTION])
    drawn = torch.randn(400, 3, 128, dtype=torch.float64)  # 1,200 tokens: ROME's thousand factors run out
    factors = transform(drawn) / gaussian(drawn)
    assert torch.allclose(factors, factors[..., :1].expand_as(factors))
    u = np.random.RandomState(2).chisquare(4, 1000)
    expected = torch.from_numpy(np.sqrt(2 / u))
    assert torch.allclose(factors[..., 0].flatten()[:1000], expected)
    with pytest.raises(ValueError, match="above 2, not 2"):
        rome.collect_embedding_tdist(mt(), 2, questions=[QUESTION])


def test_codes_of_noise() -> None:
    given = (["circle", "star"], [QUESTION])
    std = rome.collect_embedding_std(mt(), given[0])
    assert rome.noise_of(mt(), "s3", *given) == (3 * std, False)
    assert rome.noise_of(mt(), "s", *given) == (std, False)
    assert rome.noise_of(mt(), "u0.5", *given) == (0.5, True)
    assert rome.noise_of(mt(), "0.25", *given) == rome.noise_of(mt(), 0.25, *given) == (0.25, False)
    drawn = torch.randn(2, 2, 128, dtype=torch.float64)
    for code, made in (
        ("m", rome.collect_embedding_gaussian(mt(), questions=given[1])),
        ("t5", rome.collect_embedding_tdist(mt(), 5, questions=given[1])),
    ):
        noise, uniform = rome.noise_of(mt(), code, *given)
        assert callable(noise)
        assert not uniform
        assert torch.equal(noise(drawn), made(drawn))
    for code in ("x3", "u", "t", "snan", "m3", ""):
        with pytest.raises(ValueError, match="unknown noise level"):
            rome.noise_of(mt(), code, *given)


# Files


def known(number: int, **more: Any) -> dict[str, Any]:
    return {"known_id": number, "prompt": QUESTION, "subject": SUBJECT, "image": IMAGE, **more}


def test_cases_are_written_and_read_without_pickle(tmp_path: Path) -> None:
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, kind="mlp", image=IMAGE)
    path = rome.case_path(tmp_path, 7, "mlp")
    assert path == tmp_path / "knowledge_7_mlp.npz"
    rome.write_case(path, result)
    with np.load(path, allow_pickle=False) as plain:  # anybody's numpy
        assert list(plain) == list(result)
    read = rome.read_case(path)
    assert np.array_equal(read["scores"], result["scores"].numpy())
    assert read["scores"].dtype == np.float32
    assert read["input_tokens"].tolist() == result["input_tokens"]
    assert read["subject_range"].tolist() == [6, 8]
    assert (str(read["answer"]), str(read["kind"])) == ("circle", "mlp")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    rome.plot_trace_heatmap(read, tmp_path / "read.png")
    with pytest.raises(ValueError, match="the result's kind is no number"):
        rome.write_case(path, {**result, "kind": None})


def test_files_of_rome_itself(tmp_path: Path) -> None:
    """As `numpy.savez` writes what its function returns: today's hold nothing pickled, older ones do."""
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, image=IMAGE)
    arrays = {name: value.numpy() if torch.is_tensor(value) else value for name, value in result.items()}
    np.savez(tmp_path / "knowledge_1.npz", **arrays)
    assert str(rome.read_case(tmp_path / "knowledge_1.npz")["answer"]) == "circle"
    np.savez(tmp_path / "knowledge_2.npz", correct_prediction=False)
    assert not rome.read_case(tmp_path / "knowledge_2.npz")["correct_prediction"]
    np.savez(tmp_path / "knowledge_3.npz", **{**arrays, "kind": None})
    with pytest.raises(ValueError, match="holds a pickled kind"):
        rome.read_case(tmp_path / "knowledge_3.npz")
    with pytest.raises(FileNotFoundError):
        rome.read_case(tmp_path / "knowledge_4.npz")


def test_torn_files_are_known_for_what_they_are(tmp_path: Path) -> None:
    path = rome.case_path(tmp_path, 1)
    rome.write_case(path, rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, image=IMAGE))
    whole = path.read_bytes()
    random = Random(0)
    for length in [0, 1, 10, 100, *(random.randrange(len(whole)) for _ in range(40)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(rome.TornError, match="is no whole npz file"):
            rome.read_case(path)
    wrong = 0
    for _ in range(200):
        spoilt = bytearray(whole)
        spoilt[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        path.write_bytes(spoilt)
        try:
            found = rome.read_case(path)
        except ValueError:
            wrong += 1
        else:  # flags and times of the archive, which are not read
            assert all(array.dtype != object for array in found.values())
    assert wrong > 100
    for other in (b"not a zip", b"\0" * 1000, b"\x80\x04N."):
        path.write_bytes(other)
        with pytest.raises(rome.TornError):
            rome.read_case(path)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knowns = [known(1), known("b", attribute="star"), known(3, attribute="circle")]
    traced: list[tuple[str, str | None]] = []
    whole = rome_trace.calculate_hidden_flow

    def counted(*args: Any, **given: Any) -> dict[str, Any]:
        if len(traced) == 4 and stops:
            raise KeyboardInterrupt
        traced.append((given["expect"], given["kind"]))
        return whole(*args, **given)

    monkeypatch.setattr(rome, "calculate_hidden_flow", counted)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        rome.trace_cases(mt(), knowns, tmp_path, drawn=0)
    stops = False
    cases = tmp_path / "cases"
    assert len(list(cases.iterdir())) == 4
    (cases / "knowledge_1_mlp.npz").write_bytes(b"PK\x03\x04 half of it")
    kept = (cases / "knowledge_1.npz").stat().st_mtime_ns

    paths = rome.trace_cases(mt(), knowns, tmp_path, drawn=2)
    assert [path.name for path in paths] == [
        f"knowledge_{number}{kind}.npz" for number in (1, "b", 3) for kind in ("", "_mlp", "_attn")
    ]
    assert len(traced) == 4 + 1 + 5
    assert (cases / "knowledge_1.npz").stat().st_mtime_ns == kept
    read = [rome.read_case(path) for path in paths]
    assert [bool(case["correct_prediction"]) for case in read] == [True] * 3 + [False] * 3 + [True] * 3
    std = rome.collect_embedding_std(mt(), [SUBJECT] * 3)
    fresh = whole(mt(), QUESTION, SUBJECT, noise=3 * std, kind="mlp", image=IMAGE)
    assert np.array_equal(read[1]["scores"], fresh["scores"].numpy())
    # of the second question nothing is drawn: its prediction was wrong
    drawn = {"circle_1.pdf", "circle_1_mlp.pdf", "circle_1_attn.pdf"}
    assert {path.name for path in (tmp_path / "pdfs").iterdir()} == drawn

    assert rome.trace_cases(mt(), knowns, tmp_path, drawn=2) == paths
    assert len(traced) == 10


def test_a_case_with_pickled_objects_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    np.savez(tmp_path / "cases" / "knowledge_1.npz", kind=None)
    with pytest.raises(ValueError, match="holds a pickled kind"):
        rome.trace_cases(mt(), [known(1)], tmp_path)


def test_where_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = rome.trace_cases(mt(), [known(1)], noise_level="u0.5", replace=True, kinds=[None], drawn=0)
    assert path.as_posix() == "results/nu0.5_r1_blip-shapes/causal_trace/cases/knowledge_1.npz"
    for bad in ("../1", "a/b", "\0"):
        with pytest.raises(ValueError, match="cannot be part of a file's name"):
            rome.trace_cases(mt(), [known(bad)], tmp_path)  # type: ignore[arg-type]


# Plots


def drawn(result: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    """The figure that would be shown."""
    from matplotlib import pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    rome.plot_trace_heatmap(result, **given)
    (figure,) = shown
    plt.close(figure)
    return figure


@pytest.mark.parametrize(
    ("kind", "colors"), [(None, "Purples"), ("mlp", "Greens"), ("attn", "Reds"), ("cross_attn", "Oranges")]
)
def test_the_heatmap(kind: str | None, colors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.5, kind=kind, window=3, image=IMAGE)
    figure = drawn(result, monkeypatch)
    axes, bar = figure.axes
    mesh = axes.collections[0]
    assert mesh.cmap.name == colors
    assert mesh.get_clim()[0] == pytest.approx(result["low_score"])
    assert np.allclose(mesh.get_array(), result["scores"].numpy())
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["[CLS]", "what", "shape", "is", "at", "the", "bottom*", "center*", "[SEP]"]
    assert axes.yaxis_inverted()
    assert bar.get_title(loc="left") == "p(circle)"
    if kind:
        assert "3 restored" in axes.get_xlabel()


def test_words_on_the_heatmap(monkeypatch: pytest.MonkeyPatch) -> None:
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, image=IMAGE, token_range="subject_last")
    figure = drawn(result, monkeypatch, title="A", modelname="my BLIP")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["center*"]
    assert axes.get_title() == "A"
    assert axes.get_xlabel().endswith("my BLIP")
    figure = drawn(result, monkeypatch, xlabel="B")
    assert figure.axes[0].get_xlabel() == "B"
    assert figure.axes[1].get_title(loc="left") == ""


def test_maps_without_any_effect_are_white(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.0, image=IMAGE)
    result["low_score"] += 0.1
    mesh = drawn(result, monkeypatch).axes[0].collections[0]
    colors = mesh.to_rgba(mesh.get_array())[..., :3]
    assert colors.min() > 0.95
    rome.plot_trace_heatmap(result, tmp_path / "new" / "flat.pdf")
    assert (tmp_path / "new" / "flat.pdf").stat().st_size > 1000
    with pytest.raises(ValueError, match="cannot save a heatmap"):
        rome.plot_trace_heatmap(result, tmp_path / "flat.npz")
    with pytest.raises(ValueError, match="the result has no scores"):
        rome.plot_trace_heatmap({"correct_prediction": False}, tmp_path / "x.pdf")


def test_all_flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    shown: list[str] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes[0].collections[0].cmap.name))
    rome.plot_all_flow(mt(), QUESTION, SUBJECT, image=IMAGE)
    plt.close("all")
    assert shown == ["Greens", "Reds", "Purples"]
    rome.plot_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.5, savepdf=tmp_path / "a.pdf", image=IMAGE)
    assert (tmp_path / "a.pdf").is_file()
