"""A run's results as one page to read: `write_report`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image

from ... import __version__
from ...files import write_whole
from ...images import decode_image
from ...sites import HEAD_KINDS
from .aggregate import NONE, Aggregate
from .extremes import Extreme, extremes
from .overview import Judged, Overview, overview
from .profiles import Floats
from .run import Run

if TYPE_CHECKING:
    from .run import SampleMap

ReadImage = Callable[[str], bytes]
"""The bytes of the image file that a reference means."""

LEVEL = 0.95
PANELS = 8
"""Types that have a heatmap of their own: the largest."""
TYPES, REASONS, SAMPLES = 30, 30, 6
"""Rows of tables, and samples of each sort that stand out."""
MAX_ROWS = 40
"""A sample's map of more tokens is shown by role."""
THUMBNAIL = 320
PAGE_DPI = 110
"""Pixels of the page for an inch of a figure: its smallest letters are then as large as those of tables."""
MEANINGS = {
    "ok": "traced",
    "filtered": "left out: answered wrongly",
    "error": "failed",
    "not_finite": "traced, with NaN or infinity",
}


class Picture(NamedTuple):
    """A PNG file as the page holds it, and its width there in pixels."""

    data: str
    width: int

    @classmethod
    def of(cls, png: bytes, width: int) -> Picture:
        """Of a file's bytes."""
        return cls(base64.b64encode(png).decode(), width)


def write_report(run: Run, out: str | Path, read_image: ReadImage | None = None) -> Path:
    """Write index.html into a folder, and its figures beside it; returns the page's path.

    The page needs nothing but itself: pictures are part of it, it fetches nothing and runs nothing.
    read_image: for pictures of samples that stand out; without it, and for one that it raises anything for or
    that is no image, there is a placeholder.

    Raises ValueError where a file of the run is broken, OSError where the folder cannot be written.
    """
    from ...metrics import METRICS
    from ...plotting import STACKS
    from .figures import draw_curves, effect_title
    from .page import render

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    metric = run.layout.metrics[0]
    counted = overview(run, metric)
    types = _largest(counted)
    values: dict[str, Any] = {
        "title": _title(run),
        "run_id": run.layout.run_id,
        "version": __version__,
        "complete": run.complete,
        "planned": run.planned,
        "overview": counted,
        "meanings": MEANINGS,
        "settings": [*_flat(run.settings), *_flat(_mapping(run, "identity"))],
        "types": types[:TYPES],
        "hidden_types": max(0, len(types) - TYPES),
        "metric": METRICS[metric].title,
        "effect": effect_title(metric),
        "noising": run.layout.direction == "noise",
        "spread": run.layout.spread,
        "level": LEVEL,
        "failures": list(counted.failures.items())[:REASONS],
        "hidden_failures": max(0, len(counted.failures) - REASONS),
        "maps": [],
        "curves": [],
        "extremes": [],
    }
    if counted.counts["ok"]:
        averages = [
            run.aggregate(stack, kind, split="type" if types else None, level=LEVEL, unit="image")
            for stack, kind in run.maps()
        ]
        shown = [name for name, _ in types[:PANELS]]
        names = {id(one): f"{STACKS[one.stack]}, {one.kind}" for one in averages}
        values["maps"] = [_map(one, names[id(one)], shown, len(types), out) for one in averages]
        for stack in run.layout.stacks:
            of_stack = [
                one for one in averages
                if one.stack == stack.name and one.kind not in HEAD_KINDS and one.overall.samples
            ]  # fmt: skip
            if of_stack:
                path = out / f"curves-{stack.name}.png"
                draw_curves(of_stack, path)
                values["curves"].append((STACKS[stack.name], _figure(path)))
        if leading := _leading(averages):
            values["leading"] = names[id(leading)]
            values["extremes"] = list(_standing_out(run, leading, read_image, out))
        else:
            values["leading"] = "nothing: no map has finite numbers"
    page = out / "index.html"
    write_whole(page, render(values).encode())
    return page


def _title(run: Run) -> str:
    """The model, where the plan names it."""
    model = run.settings.get("model") or _mapping(run, "places").get("model")
    return str(model) if model else f"run {run.layout.run_id}"


def _mapping(run: Run, name: str) -> dict[str, Any]:
    """A part of the plan, without what is said elsewhere."""
    part = run.plan.get(name)
    return (
        {key: part[key] for key in part if key not in ("format", "settings")}
        if isinstance(part, dict)
        else {}
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of settings, of nested ones with dots between names."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield (
                f"{prefix}{name}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
            )


def _largest(counted: Overview) -> list[tuple[str, Judged]]:
    """Types by how many samples of them were traced; none where there is nothing to tell apart."""
    if counted.types is None or set(counted.types) == {NONE}:
        return []
    return sorted(counted.types.items(), key=lambda item: (-item[1].traced, -item[1].samples, item[0]))


def _map(one: Aggregate, name: str, types: Sequence[str], all_types: int, out: Path) -> dict[str, Any]:
    """What the page says of one map's average, and its figure, also saved."""
    from .figures import draw_averages, shown_rows

    excluded = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in one.overall.excluded.items())
    told: dict[str, Any] = {"name": name, "excluded": excluded, "peak": None, "figure": None}
    if not one.overall.samples:
        return told
    told["peak"] = _peak(one)
    groups = {kind: one.groups[kind] for kind in types if kind in one.groups and one.groups[kind].samples}
    path = out / f"{one.stack}-{one.kind}.png"
    draw_averages(one, groups if len(one.groups) > 1 else {}, path)
    told["figure"] = _figure(path)
    rows = f"Heads{shown_rows(one, one.overall)[2]}" if one.kind in HEAD_KINDS else "Roles of tokens"
    told["caption"] = f"{rows} from the top down, layers from left to right; n: samples." + (
        f" The {len(groups)} largest of {all_types} types." if all_types > len(groups) else ""
    )
    return told


def _peak(one: Aggregate) -> dict[str, str]:
    """The cell with the largest average effect."""
    average = one.overall
    place = np.unravel_index(int(np.nanargmax(_sign(one.metric) * average.mean)), average.mean.shape)
    role, *head, layer = map(int, place)

    def at(part: Floats) -> str:
        value = float(part[place])
        return "–" if np.isnan(value) else f"{value:.3g}"

    return {
        "role": one.rows[role] + (f", head {head[0]}" if head else ""),
        "layer": str(layer),
        "mean": at(average.mean),
        "interval": f"{at(average.lower)} to {at(average.upper)}",
        "n": f"{average.n[role]:,}",
    }


def _sign(metric: str) -> int:
    """-1 where effects are negative, since the metric falls when the answer comes back."""
    from ...metrics import METRICS

    return -1 if METRICS[metric].falls else 1


def _leading(averages: Sequence[Aggregate]) -> Aggregate | None:
    """The map that samples stand out in: the first one of whole states of a text stack, if there is one."""
    usable = [one for one in averages if one.overall.samples]
    return min(usable, key=lambda one: (one.kind in HEAD_KINDS, one.stack == "vision"), default=None)


def _standing_out(
    run: Run, average: Aggregate, read_image: ReadImage | None, out: Path
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Headings, explanations and samples."""
    found = extremes(run, average, SAMPLES, _sign(average.metric))
    yield (
        "The strongest",
        "The largest effect at any role and layer.",
        [
            _sample(run, average, one, f"strongest-{number}", "effect {:.3g}", read_image, out)
            for number, one in enumerate(found.strongest, 1)
        ],
    )
    if np.isfinite(average.overall.standard_deviation).any():
        yield (
            "The most unusual",
            "Farthest from the average by role and layer: the root mean square over cells of the distance in "
            "standard deviations between samples. 1 is ordinary.",
            [
                _sample(run, average, one, f"unusual-{number}", "distance {:.2f}", read_image, out)
                for number, one in enumerate(found.unusual, 1)
            ],
        )


def _sample(
    run: Run, average: Aggregate, one: Extreme, name: str, about: str, read_image: ReadImage | None, out: Path
) -> dict[str, Any]:
    from .figures import draw_sample

    metric = average.metric
    scores = (f"{metric}_high", f"{metric}_low")
    columns = (
        "sample_id",
        "image",
        "question",
        "type",
        "answer",
        "answers",
        "model_answer",
        "correct",
        "total_effect_vanishes",
        *scores,
    )
    row = run.row(one.sample_id, columns)
    found = run.effects(one.sample_id, average.stack, average.kind, metric)
    path = out / f"{name}.png"
    least = abs(row[scores[0]] - row[scores[1]]) / 4  # noise is not blown up
    draw_sample(*_rows(found, _sign(metric)), average.stack, metric, least, path)
    return {
        "row": row,
        "high": row[scores[0]],
        "low": row[scores[1]],
        "about": about.format(one.value),
        "figure": _figure(path),
        "thumbnail": None if read_image is None else _thumbnail(read_image, row["image"]),
    }


def _rows(found: SampleMap, sign: int) -> tuple[Floats, Sequence[str]]:
    """A sample's map as rows [rows, layers] and their names: tokens; roles where there are many tokens; of
    kinds of heads the heads at the token with the largest effect."""
    values = found.values
    if values.ndim == 3:
        token = int((sign * values).max((0, 2)).argmax())
        return values[:, token], [f"head {head}" for head in range(len(values))]
    if len(values) <= MAX_ROWS:
        return values, found.tokens
    roles = np.array(found.roles)
    names = list(dict.fromkeys(found.roles))
    return np.stack([values[roles == name].mean(0) for name in names]), names


def _thumbnail(read_image: ReadImage, reference: str | None) -> Picture | None:
    """A small picture; None for one that cannot be shown, which is no reason to have no report."""
    try:
        picture = decode_image(read_image(reference or ""), "the image")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        data = BytesIO()
        picture.save(data, "PNG")
    except Exception:  # a reader may be anybody's
        return None
    return Picture.of(data.getvalue(), picture.width)


def _figure(path: Path) -> Picture:
    """As large on the page as it was drawn."""
    from ...plotting import DPI

    with PIL.Image.open(path) as image:
        width = image.width
    return Picture.of(path.read_bytes(), round(width * PAGE_DPI / DPI))
