"""`blip-trace export` and `blip-trace report`: what comes of a run over a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .cli_errors import one_sentence_errors

if TYPE_CHECKING:
    from .sweep.results.run import Run

RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder or address of a run.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command()(export)
    app.command()(report)


def export(
    run: RunFolder,
    to: Annotated[
        Path, typer.Option(help="The file: .parquet, .csv, .zarr or .nc.", metavar="FILE", show_default=False)
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="long or csv (a row for each cell), wide (Parquet, a row for each sample), zarr or netcdf "
            "(labelled arrays).",
            show_default="by the file's ending",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Write a run's results as one file for other programs."""
    errors = Console(stderr=True)
    with one_sentence_errors(errors):
        with errors.status("writing"):
            from .sweep.results import load_run
            from .sweep.results.export import export as write

            write(load_run(run), to, format)
        _say_written(to)


def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="RUN/report", metavar="DIR")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the data set's images lie in.",
            show_default="where the run found them",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Write a page with a run's averages, the samples that stand out, and what failed."""
    errors = Console(stderr=True)
    with one_sentence_errors(errors):
        if images is not None and not images.is_dir():
            raise NotADirectoryError(f"{images} is no folder of images")
        with errors.status("averaging and drawing"):
            from .sweep.media import Media
            from .sweep.results import load_run
            from .sweep.results.report import write_report

            loaded = load_run(run)
            media = Media(*loaded.images) if images is None else Media(images)
            page = write_report(loaded, _report_folder(loaded) if out is None else out, media.read)
        _say_written(page)


def _report_folder(run: Run) -> Path:
    """In the run's own folder, if that is one of this machine."""
    from .sweep.disk import Disk

    if not isinstance(run.store, Disk):
        raise ValueError(f"{run.store} is no folder: say where the report is to be written, with --out DIR")
    return run.store.root / "report"


def _say_written(path: Path) -> None:
    Console(highlight=False).print(f"wrote {path}", markup=False, soft_wrap=True)
