"""The command line: `blip-trace run`, `blip-trace doctor`."""

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
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from . import __version__

QUIET_SECONDS = 10.0
"""Between two progress lines where there is no terminal to draw a bar on."""

DEFAULT_STACKS, DEFAULT_KINDS = "text_encoder,text_decoder", "hidden"
NOISE, ENGINE = "Noise", "Engine"

EXAMPLES = """
Examples: the model that ships with the package, on your picture

    blip-trace run --image scene.png --question "what color is this" --out traces

a BLIP from the Hugging Face hub, several kinds of state, windows of three layers

    blip-trace run --model Salesforce/blip-vqa-base --image cat.jpg \\
        --question "what animal is this" --kinds hidden,mlp,cross_attn \\
        --window 3 --dtype bfloat16 --out traces

the joint probability of an answer of several tokens, under other noise

    blip-trace run --image scene.png --question "where is the star" \\
        --answer "top left" --mode add --mean 0 --std 3 --out traces
"""

app = typer.Typer(
    name="blip-trace",
    help="Causal tracing of BLIP: which states of the model carry its answer about an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


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


@app.command(epilog=EXAMPLES)
def run(
    image: Annotated[Path, typer.Option(help="Image file: JPEG, PNG, WEBP, BMP or GIF.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    out: Annotated[Path, typer.Option(help="Folder for heatmaps and numbers; made if need be.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a BlipForQuestionAnswering.", show_default="the one that ships"
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="Answer to score, all its tokens jointly.", show_default="first token of the model's own"
        ),
    ] = None,
    stacks: Annotated[
        list[str] | None,
        typer.Option(
            help="Stacks to map, by commas or repeated.", metavar="NAMES", show_default=DEFAULT_STACKS
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of state to restore, likewise: hidden, hidden_after_self_attn, "
            "hidden_after_cross_attn, self_attn, cross_attn, mlp, self_attn_head, cross_attn_head.",
            metavar="NAMES",
            show_default=DEFAULT_KINDS,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Consecutive layers that one cell restores.")] = 1,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of the question to map, from 0 or from -1 backwards; repeated.",
            metavar="NUMBER",
            show_default="all",
        ),
    ] = None,
    direction: Annotated[
        str,
        typer.Option(
            help="denoise: clean states into the corrupted run; noise: corrupted ones into the clean run."
        ),
    ] = "denoise",
    samples: Annotated[
        int, typer.Option(help="Draws of the noise; a map is their mean.", rich_help_panel=NOISE)
    ] = 10,
    mean: Annotated[
        float, typer.Option(help="Mean of the noise on the image embeddings.", rich_help_panel=NOISE)
    ] = 1.0,
    std: Annotated[float, typer.Option(help="Its standard deviation.", rich_help_panel=NOISE)] = 5.0,
    mode: Annotated[
        str, typer.Option(help="multiply the embeddings by it, or add it.", rich_help_panel=NOISE)
    ] = "multiply",
    seed: Annotated[int, typer.Option(help="Its seed.", rich_help_panel=NOISE)] = 0,
    backend: Annotated[
        str,
        typer.Option(
            help="auto, native, reference, or hooks (slow; defines what is right).", rich_help_panel=ENGINE
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.", rich_help_panel=ENGINE)] = "float32",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads.", show_default="as torch chooses", rich_help_panel=ENGINE),
    ] = None,
    memory: Annotated[
        int, typer.Option(min=1, help="MiB that the states of one pass may take.", rich_help_panel=ENGINE)
    ] = 128,
) -> None:
    """Trace one question about one image.

    Writes into the folder a heatmap for each stack and kind (STACK-KIND.png), the means as trace.json, and
    all samples as trace.safetensors (for blip_trace.TraceResult.load), and prints the maps. Bad input ends
    with exit code 2 and one sentence, and writes nothing.
    """
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    errors = Console(stderr=True)
    with _one_sentence_errors(errors), _staging(out) as staging:
        with errors.status("loading torch, transformers and the model"), _notes(errors):
            from .sites import DIRECTIONS, check_maps, check_names

            check_names("direction", direction, DIRECTIONS)
            maps = check_maps(_names(stacks, DEFAULT_STACKS), _names(kinds, DEFAULT_KINDS), window)

            import torch

            from .corruption import GaussianNoise
            from .lowering.load import shipped_model
            from .tracer import Tracer

            if threads is not None:
                torch.set_num_threads(threads)
            noise = GaussianNoise(mean, std, mode, samples, seed)  # type: ignore[arg-type]
            tracer = Tracer.from_pretrained(
                model if model is not None else shipped_model(),
                dtype=dtype,
                backend=backend,  # type: ignore[arg-type]
                memory=memory * 2**20,
            )
        started = time.perf_counter()
        with _progress(errors) as progress:
            chosen = {"text_encoder": tokens} if tokens else None
            result = tracer.trace(
                image,
                question,
                answer,
                noise,
                *maps,
                window,
                progress=progress,
                tokens=chosen,
                direction=direction,
            )
        seconds = time.perf_counter() - started

        with errors.status("writing"):
            for stack, kind in result.restored:
                result.plot(stack, kind, staging / f"{stack}-{kind}.png")
            result.save(staging / "trace.safetensors")
            content = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False)
            (staging / "trace.json").write_text(content + "\n", encoding="utf-8")
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


def _names(given: list[str] | None, default: str) -> list[str]:
    """The names in options that may be repeated and may hold several, with commas between them."""
    return [name.strip() for part in given or [default] for name in part.split(",")]


@contextmanager
def _one_sentence_errors(console: Console) -> Iterator[None]:
    """Turn what bad input raises into one line and exit code 2, and Ctrl-C into 130."""
    from .ops import BackendUnavailableError

    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, BackendUnavailableError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        console.print(f"blip-trace: {message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


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


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    if not console.is_terminal:
        shown = time.monotonic()

        def tell(share: float) -> None:
            nonlocal shown
            if time.monotonic() - shown >= QUIET_SECONDS:
                shown = time.monotonic()
                console.print(f"tracing: {share:.0%}")

        yield tell
        return
    columns: tuple[Any, ...] = (
        TextColumn("tracing"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tracing", total=1.0)
        yield lambda share: bar.update(task, completed=share)
