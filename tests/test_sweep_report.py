"""A report shows what was planted in a run, and lets nothing of a data set be more than text."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import typer
from sweep_runs import LAYERS, LAYOUT, Row, make_rows, write_run
from typer.testing import CliRunner

from blip_trace import cli_results
from blip_trace.sweep.results import Run, load_run
from blip_trace.sweep.results.aggregate import MAX_GROUPS
from blip_trace.sweep.results.extremes import extremes
from blip_trace.sweep.results.figures import draw_averages, draw_curves, draw_sample
from blip_trace.sweep.results.overview import MAX_REASONS, OTHER_REASONS, overview
from blip_trace.sweep.results.report import write_report
from blip_trace.sweep.schema import StackLayout

COLUMN = "text_encoder_hidden_probability"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'{{ 7 * 7 }}\x1b[31m\u202e$x$"


class Page(HTMLParser):
    """Tags, texts, and values of attributes of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.parts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.parts.append(data)

    def pictures(self) -> list[PIL.Image.Image]:
        given = [value or "" for name, value in self.attributes if name == "src"]
        assert all(value.startswith("data:image/png;base64,") for value in given)
        return [PIL.Image.open(BytesIO(base64.b64decode(value.partition(",")[2]))) for value in given]


def picture(reference: str) -> bytes:
    """Red for every reference."""
    data = BytesIO()
    PIL.Image.new("RGB", (640, 480), (255, 0, 0)).save(data, "JPEG")
    return data.getvalue()


def report(folder: Path, rows: list[Row], layout: Any = LAYOUT, read_image: Any = None) -> tuple[Run, Page]:
    run = load_run(write_run(folder / "run", rows, (len(rows) // 2,), layout))
    return run, Page(write_report(run, folder / "report", read_image))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """One sample is far stronger than all others, one runs the other way."""
    rows = make_rows(150)
    for place, value in ((30, 5.0), (60, -4.0)):
        assert rows[place]["status"] == "ok"
        rows[place][COLUMN] = (np.array(rows[place][COLUMN]) * 0 + value).tolist()
    other = [[-4.0 if role == "content" else -1.0] * LAYERS for role in rows[60]["text_encoder_roles"]]
    rows[60][COLUMN] = other
    rows[30]["question"] = HOSTILE
    rows[30]["answer"] = rows[30]["type"] = rows[30]["sample_id"] = HOSTILE
    rows[60]["question"] = "what runs the other way ?"
    rows[:3] = rows[2::-1]  # roles are first met in another order than that of averages
    rows[3]["reason"] = HOSTILE + " cannot be decoded"
    return rows


@pytest.fixture(scope="module")
def made(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Page, Path]:
    folder = tmp_path_factory.mktemp("report")
    return *report(folder, rows, read_image=picture), folder / "report"


def test_what_it_says(made: tuple[Run, Page, Path], rows: list[Row]) -> None:
    run, page, _ = made
    counts = run.counts()
    for status, name in (("ok", "traced"), ("filtered", "left out"), ("error", "failed")):
        assert re.search(rf"{name}[^0-9]* {counts[status]} {100 * counts[status] / 150:.1f} %", page.text)
    known = [row["correct"] for row in rows if row["correct"] is not None]
    assert f"{100 * sum(known) / len(known):.1f} % right ( {sum(known)} of {len(known)}" in page.text.replace(
        "(", "( "
    )
    assert "corruption.samples 10" in page.text
    assert "150 of 150 samples" in page.text
    for name in ("color", "count", "yes/no"):
        traced = sum(row["type"] == name and row["status"] == "ok" for row in rows)
        samples = sum(row["type"] == name for row in rows)
        assert f"{name} {samples} {traced}" in page.text
    assert f"{counts['filtered']} samples were left out" in page.text
    assert "not complete" not in page.text
    # the planted effect is where the answer is carried
    content = run.aggregate("text_encoder", "hidden", unit="image").layer_curve()
    assert content.mean.argmax() == LAYERS - 1
    shown = f"content {LAYERS - 1} {content.mean[-1]:.3g} {content.lower[-1]:.3g} to {content.upper[-1]:.3g}"
    assert f"question encoder, hidden {shown}" in page.text


def test_failures_are_counted_by_reason(made: tuple[Run, Page, Path], rows: list[Row]) -> None:
    page = made[1]
    for reason in ("image 0 cannot be decoded", "image 1 cannot be decoded"):
        ids = [row["sample_id"] for row in rows if row.get("reason") == reason]
        assert f"{reason} {len(ids)} {', '.join(ids[:3])}" in page.text
    bad = sum(row["status"] == "not_finite" for row in rows)
    assert f"NaN or infinity {bad} " in page.text


def test_nothing_of_the_data_is_more_than_text(made: tuple[Run, Page, Path]) -> None:
    page = made[1]
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)" in page.text  # it was there
    assert "{{ 7 * 7 }}" in page.text
    assert page.text.count("<script>alert(1)</script>") >= 4  # question, answer, type, reason
    assert not set(page.source) & {"\x1b", "\u202e"}
    assert "http" not in page.source.replace("http-equiv", "")
    assert not [
        value for name, value in page.attributes if name in ("href", "src") and "data:" not in str(value)
    ]
    assert "default-src 'none'" in page.source


def test_the_samples_that_stand_out_come_first(made: tuple[Run, Page, Path], rows: list[Row]) -> None:
    run, page, _ = made
    average = run.aggregate("text_encoder", "hidden", unit="image")
    found = extremes(run, average, 3)
    assert found.strongest[0].sample_id == rows[30]["sample_id"]
    assert found.strongest[0].value == pytest.approx(5.0 - np.float32(rows[30]["probability_low"]), abs=1e-5)
    assert {one.sample_id for one in found.unusual[:2]} == {rows[place]["sample_id"] for place in (30, 60)}
    assert found.unusual[1].value > 2 * found.unusual[2].value
    strongest, unusual = page.text.split("The most unusual")
    assert "what runs the other way ?" in unusual
    assert "what runs the other way ?" not in strongest
    assert HOSTILE[:25] in strongest
    # distance, by hand, of the one that runs the other way
    profile = np.full((6, LAYERS), -1.0 - np.float32(rows[60]["probability_low"]))
    profile[average.rows.index("content")] -= 3
    away = (profile - average.overall.mean) / average.overall.standard_deviation
    (value,) = (one.value for one in found.unusual if one.sample_id == rows[60]["sample_id"])
    assert value == pytest.approx(np.sqrt((away**2).mean()), rel=1e-6)


def test_figures_are_beside_the_page_and_in_it(made: tuple[Run, Page, Path]) -> None:
    _, page, folder = made
    maps = [f"{stack}-{kind}" for stack in ("text_encoder", "text_decoder")
            for kind in ("hidden", "cross_attn_head")]  # fmt: skip
    names = [*maps, "curves-text_encoder", "curves-text_decoder"]
    names += [f"{what}-{number}" for what in ("strongest", "unusual") for number in range(1, 7)]
    assert {file.name for file in folder.iterdir()} == {"index.html", *(f"{name}.png" for name in names)}
    for name in names:
        assert base64.b64encode((folder / f"{name}.png").read_bytes()).decode() in page.source
    shown = page.pictures()
    assert len(shown) == len(names) + 12
    red = [one for one in shown if one.size == (320, 240)]  # thumbnails
    assert len(red) == 12
    assert np.allclose(np.asarray(red[0].convert("RGB"))[100, 100], (255, 0, 0), atol=3)


def unreadable(answers: Iterator[bytes | Exception]) -> Callable[[str], bytes]:
    def read(reference: str) -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return read


@pytest.mark.parametrize(
    "read_image",
    [None, unreadable(itertools.cycle([b"no image", b"", picture("")[:99], OSError(), ZeroDivisionError()]))],
)
def test_pictures_that_cannot_be_shown(tmp_path: Path, read_image: Callable[[str], bytes] | None) -> None:
    layout = replace(LAYOUT, stacks=LAYOUT.stacks[:1], kinds=("hidden",), metrics=("probability",))
    _, page = report(tmp_path, make_rows(10, layout), layout, read_image)
    shown = page.text.count("image not available")
    assert shown == 2 * 6
    assert len(page.pictures()) == 2 + shown


def test_a_run_in_which_nothing_was_traced(rows: list[Row], tmp_path: Path) -> None:
    failed = [row for row in rows if row["status"] != "ok"]
    run, page = report(tmp_path, failed)
    assert "No sample was traced, so there is nothing to average." in page.text
    assert not page.pictures()
    assert "image 1 cannot be decoded" in page.text
    run.store.remove("_SUCCESS")
    page = Page(write_report(load_run(run.store.address), tmp_path / "report"))
    assert "The run is not complete" in page.text


def test_a_map_without_finite_numbers(rows: list[Row], tmp_path: Path) -> None:
    broken = [dict(row) for row in rows[:20] if row["status"] == "ok"]
    for row in broken:
        for name in ("hidden", "cross_attn_head"):
            column = f"text_encoder_{name}_probability"
            row[column] = (np.array(row[column]) * np.nan).tolist()
    _, page = report(tmp_path, broken)
    assert page.text.count("no sample has this map with finite numbers") == 2
    assert "By their map of answer decoder, hidden" in page.text


def test_single_samples_of_the_noise_and_single_questions(tmp_path: Path) -> None:
    layout = replace(LAYOUT, spread=False, kinds=("hidden",), metrics=("probability",))
    row = next(row for row in make_rows(5, layout) if row["status"] == "ok")
    row |= {"type": "", "correct": None}
    _, page = report(tmp_path, [row], layout)
    assert "a single sample of the corruption" in page.text
    assert "Of no sample is it known" in page.text
    assert "Types of questions" not in page.text
    assert "The most unusual" not in page.text  # of one sample


def test_heads_alone_images_and_metrics_that_fall(tmp_path: Path) -> None:
    layout = replace(
        LAYOUT, stacks=(StackLayout("vision", LAYERS),), kinds=("hidden",), metrics=("kl_divergence",)
    )
    made = make_rows(12, layout)
    for row in made:
        if row["status"] == "ok":  # the divergence falls most at the class token, in layer 1
            row["kl_divergence_high"], row["kl_divergence_low"] = 0.0, 4.0
            values = np.full((5, LAYERS), 3.9)
            values[0, 1] = 1.0
            row["vision_hidden_kl_divergence"] = values.tolist()
    _, page = report(tmp_path / "vision", made, layout)
    assert re.search(r"image encoder, hidden class 1 -3 -3 to -3", page.text)
    heads = replace(LAYOUT, kinds=("cross_attn_head",), metrics=("probability",))
    _, page = report(tmp_path / "heads", make_rows(12, heads), heads)
    assert "By their map of question encoder, cross_attn_head" in page.text
    assert "Heads at “content” from the top down" in page.text
    assert "layer by layer" not in page.text


def test_many_types_and_reasons_are_bounded(tmp_path: Path) -> None:
    layout = replace(LAYOUT, stacks=LAYOUT.stacks[1:], kinds=("hidden",), metrics=("probability",))
    (row,) = make_rows(1, layout)
    some = [row | {"sample_id": str(number), "type": f"type {number}"} for number in range(MAX_GROUPS)]
    _, page = report(tmp_path / "some", some, layout)
    assert f"the 30 largest; {MAX_GROUPS - 30} more are not shown" in page.text
    assert f"The 8 largest of {MAX_GROUPS} types." in page.text
    many = [*some, row | {"sample_id": "more", "type": "more"}]
    many += [{"sample_id": f"f{number}", "status": "error", "reason": f"reason {number}"}
             for number in range(MAX_REASONS + 5)]  # fmt: skip
    run, page = report(tmp_path / "many", many, layout)
    assert "too many types of questions" in page.text
    failures = overview(run, "probability").failures
    assert len(failures) == MAX_REASONS + 1
    assert failures[OTHER_REASONS].samples == 5
    assert f"{MAX_REASONS + 1 - 30} rarer reasons are not shown" in page.text


def test_figures_show_what_they_are_given(made: tuple[Run, Page, Path], tmp_path: Path) -> None:
    """The larger the average effect, the darker; panels share their colours; odd names are no formulas."""
    run = made[0]
    average = run.aggregate("text_encoder", "hidden", split="type")
    draw_averages(average, average.groups, tmp_path / "averages.png")
    draw_curves([average, average], tmp_path / "curves.png")
    for name in ("averages", "curves"):
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 500
    grid = np.array([[0.0, 0.5, 1.0, -1.0, np.nan]])
    draw_sample(grid, ["$_"], "text_encoder", "probability", 0.0, tmp_path / "sample.png")
    draw_sample(grid, ["$_"], "text_encoder", "probability", 4.0, tmp_path / "pale.png")
    darkest = []
    for name in ("sample", "pale"):
        with PIL.Image.open(tmp_path / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        cells = pixels[:, : pixels.shape[1] * 7 // 10]
        tinted = (cells[..., 2] - cells[..., 1]) > 20  # purple
        darkest.append(cells[tinted].sum(-1).min() if tinted.any() else 765)
    assert darkest[0] < 350 < darkest[1]


def test_the_command(made: tuple[Run, Page, Path], tmp_path: Path) -> None:
    app = typer.Typer()
    cli_results.register(app)

    def call(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["report", *map(str, arguments)])
        return result.exit_code, result.output

    layout = replace(LAYOUT, stacks=LAYOUT.stacks[:1], kinds=("hidden",), metrics=("probability",))
    rows = make_rows(6, layout)
    run = write_run(tmp_path / "run", rows, (), layout)
    (tmp_path / "set" / "images").mkdir(parents=True)
    for row in rows[:3]:
        (tmp_path / "set" / row["image"]).write_bytes(picture(""))
    (tmp_path / "secret.png").write_bytes(picture(""))
    code, output = call(run)
    assert code == 0, output
    assert "index.html" in output
    assert Page(run / "report" / "index.html").text.count("image not available") > 0

    def thumbnails(*more: object) -> int:
        code, output = call(run, "--out", tmp_path / "out", *more)
        assert code == 0, output
        return [one.size for one in Page(tmp_path / "out" / "index.html").pictures()].count((320, 240))

    assert thumbnails() == 0
    given = thumbnails("--images", tmp_path / "set")
    assert given >= 3
    plan = json.loads((run / "plan.json").read_text())
    places = {"images": str(tmp_path / "set"), "absolute": False, "model": "the <model>"}
    (run / "plan.json").write_text(json.dumps({**plan, "settings": {}, "places": places}))
    assert thumbnails() == given  # where the run found them
    assert "Causal tracing of the <model>" in Page(tmp_path / "out" / "index.html").text
    for wrong, match in (
        ((tmp_path,), "is no run"),
        ((run, "--images", tmp_path / "nothing"), "is no folder of images"),
        ((run, "--out", tmp_path / "secret.png"), "File exists"),
    ):
        code, output = call(*wrong)
        assert code == 2
        assert len(output.strip().splitlines()) == 1
        assert match in output
