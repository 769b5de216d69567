"""The command line: `blip-trace run` and `doctor`; the commands on data sets have files of their own."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import __version__, cli_results, cli_sweep
from . import cli_options as options
from .cli_data import data_app
from .cli_errors import one_sentence_errors
from .cli_progress import duration, showing_share

if TYPE_CHECKING:
    from .measuring import Forecast
    from .result import TraceResult

ANNOUNCED_SECONDS = 3.0
"""Work that will take longer is announced before it begins."""

app = typer.Typer(
    name="blip-trace",
    help="Causal tracing of BLIP: which states of the model carry its answer about an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(data_app, name="data")
cli_sweep.register(app)
cli_results.register(app)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a token that the terminal cannot show is no reason to stop
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"blip-trace {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=options.EXAMPLES)
def run(
    context: typer.Context,
    image: options.Image,
    question: options.Question,
    out: options.Out,
    model: options.Model = "vqa",
    answer: options.Answer = None,
    corrupt: options.Corrupt = None,
    samples: options.Samples = None,
    mean: options.Mean = None,
    std: options.Std = None,
    mode: options.Mode = None,
    seed: options.Seed = None,
    span: options.Span = None,
    distribution: options.Distribution = None,
    absolute: options.Absolute = None,
    swap: options.Swap = None,
    swap_question: options.SwapQuestion = None,
    ablation: options.Ablation = None,
    reference: options.Reference = None,
    box: options.Box = None,
    blur: options.Blur = None,
    stacks: options.Stacks = None,
    kinds: options.Kinds = None,
    tokens: options.Tokens = None,
    patch_group: options.PatchGroup = None,
    window: options.Window = 1,
    direction: options.Direction = "denoise",
    sever: options.Sever = None,
    metrics: options.Metrics = None,
    foil: options.Foil = None,
    interval: options.Interval = None,
    method: options.MethodName = "exact",
    top: options.Top = None,
    steps: options.Steps = None,
    check: options.Check = None,
    backend: options.Backend = "auto",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    memory: options.Memory = None,
) -> None:
    """Trace one question about one image.

    Writes into the folder a heatmap for each stack and kind (STACK-KIND.png, by further metrics
    STACK-KIND-METRIC.png; of the image encoder, drawn on the picture, vision-KIND-image.png), the means as
    trace.json, and all samples as trace.safetensors (for blip_trace.TraceResult.load), and prints the maps.
    Bad input ends with exit code 2 and one sentence, and writes nothing.
    """
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    errors = Console(stderr=True)
    noise = options.typed(context.params, options.CORRUPTION_OPTIONS)
    with one_sentence_errors(errors), _staging(out) as staging:
        with errors.status("loading torch, transformers and the model"), _notes(errors):
            import torch

            from .choices import count_samples, make_corruption, make_method
            from .lowering.load import SHIPPED, shipped_model
            from .request import check_request
            from .sites import STACKS
            from .tracer import Tracer
            from .uncertainty import bootstrap_interval

            corruption = make_corruption(options.names(corrupt) or ["embeddings"], noise)
            chosen = make_method(method, options.typed(context.params, options.METHOD_OPTIONS))
            if interval is not None:  # refused now, not when all is done
                bootstrap_interval(torch.zeros(count_samples(corruption), 1), interval, draws=1)
            asked: dict[str, Any] = {
                "stacks": options.names(stacks) or None,
                "kinds": options.names(kinds) or ["hidden"],
                "window": window,
                "foil": foil,
                "direction": direction,
                "metrics": options.names(metrics) or ["probability"],
                "sever": options.names(sever),
                "patch_group": 1 if patch_group is None else patch_group,
                "method": chosen,
            }
            if patch_group is not None and "vision" not in options.names(stacks):
                raise ValueError("--patch-group belongs to --stacks vision")
            check_request(STACKS, **{**asked, "stacks": asked["stacks"] or STACKS})  # before a large model
            if threads is not None:
                torch.set_num_threads(threads)
            tracer = Tracer.from_pretrained(
                shipped_model(model) if model in SHIPPED else model,
                device=device,
                dtype=dtype,
                backend=backend,  # type: ignore[arg-type]
                memory=None if memory is None else memory * 2**20,
            )
        started = time.perf_counter()
        with showing_share(errors) as progress:
            result = tracer.trace(
                image,
                question,
                answer,
                corruption,
                progress=progress,
                tokens=options.tokens_by_stack(options.names(tokens), asked["stacks"] or tracer.stacks),
                announce=_announcement(errors) if method == "exact" or check else None,
                **asked,
            )
        seconds = time.perf_counter() - started

        with errors.status("writing"):
            _write(result, staging, interval)
            written = sorted(part.name for part in staging.iterdir())
            for name in written:
                (staging / name).replace(out / name)

        from .terminal import print_trace

        print_trace(console, result, seconds)
        console.print(f"\nwrote {', '.join(written)} to {out}", markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Tell what was built here, which backends work, and why the others do not."""
    from .doctor import print_report

    print_report(Console())


def _announcement(console: Console) -> Callable[[Forecast], None]:
    """Says how long the work will take where it will take long."""

    def announce(forecast: Forecast) -> None:
        if forecast.seconds >= ANNOUNCED_SECONDS:
            console.print(f"{forecast.cells:,} cells, about {duration(forecast.seconds)}", highlight=False)

    return announce


def _write(result: TraceResult, folder: Path, level: float | None) -> None:
    """Plots by every metric, those of the first without its name, and the numbers.

    The image encoder's map is drawn on the picture; as a heatmap too where it has few rows.
    """
    from .terminal import MAX_ROWS

    by_metric = {}
    for metric in result.measured:
        shown = result.by(metric)
        marked = "" if metric == result.metric else f"-{metric}"
        for stack, kind in shown.restored:
            if stack == "vision":
                shown.plot_image(kind, folder / f"{stack}-{kind}{marked}-image.png")
            if stack != "vision" or len(shown.tokens(stack)) <= MAX_ROWS:
                shown.plot(stack, kind, folder / f"{stack}-{kind}{marked}.png", level=level)
        numbers = shown.to_dict()
        by_metric[metric] = {name: numbers[name] for name in ("high_score", "low_score", "maps")}
    content = json.dumps({**result.to_dict(), "by_metric": by_metric}, ensure_ascii=False, allow_nan=False)
    (folder / "trace.json").write_text(content + "\n", encoding="utf-8")
    result.save(folder / "trace.safetensors")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder inside `out` for files that are not whole yet: made before any work, so that a folder that
    cannot be written is found out at once; gone afterwards, and so is `out` if nothing came into it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, not a folder to write into")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".blip-trace-", dir=out) as staging:
            yield Path(staging)
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Print the package's warnings as plain notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            console.print(f"note: {warning.message}", markup=False, highlight=False, soft_wrap=True)
