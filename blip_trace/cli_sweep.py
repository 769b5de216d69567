"""`blip-trace sweep`, `status` and `verify`: whole data sets."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import cli_options as options
from .cli_data import Format, Images, Split
from .cli_errors import one_sentence_errors
from .cli_progress import SweepProgress, duration

if TYPE_CHECKING:
    from .sweep.driver import Outcome
    from .sweep.planning import Estimate, Order

FAILED_SAMPLES, STOPPED = 3, 130
"""Exit codes: everything was done but some samples failed; stopped, and the same command goes on."""
WHEN_RESUMING = {"out", "executor", "workers", "address", "gpus", "threads", "memory", "retry"}
"""Options that say nothing about what a run is."""


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command(epilog=options.SWEEP_EXAMPLES)(sweep)
    app.command()(status)
    app.command()(verify)


def sweep(
    context: typer.Context,
    out: Annotated[
        str,
        typer.Option(help="Folder of the run, made if need be, or s3://BUCKET/FOLDER.", metavar="DIR"),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="File or folder of questions (see blip-trace data describe), or scenes:COUNT.",
            show_default="as planned in DIR",
            metavar="PATH",
        ),
    ] = None,
    format: Format = None,
    images: Images = None,
    split: Split = None,
    limit: options.Limit = None,
    on_error: options.OnError = "skip",
    model: options.Model = "vqa",
    answer: options.SweepAnswer = "own",
    only_correct: options.OnlyCorrect = False,
    corrupt: options.SweepCorrupt = None,
    samples: options.Samples = None,
    mean: options.Mean = None,
    std: options.Std = None,
    mode: options.Mode = None,
    span: options.SweepSpan = None,
    distribution: options.Distribution = None,
    absolute: options.Absolute = None,
    swap: options.Swap = None,
    swap_question: options.SwapQuestion = None,
    ablation: options.Ablation = None,
    reference: options.Reference = None,
    box: options.Box = None,
    blur: options.Blur = None,
    seed: options.SweepSeed = 0,
    stacks: options.Stacks = None,
    kinds: options.Kinds = None,
    tokens: options.Tokens = None,
    patch_group: options.PatchGroup = None,
    window: options.Window = 1,
    direction: options.Direction = "denoise",
    sever: options.Sever = None,
    metrics: options.SweepMetrics = None,
    method: options.MethodName = "exact",
    top: options.Top = None,
    steps: options.Steps = None,
    store: options.StoreType = "float32",
    batch: options.Batch = 8,
    shard_size: options.ShardSize = None,
    executor: options.ExecutorName = "local",
    workers: options.Workers = None,
    address: options.Address = None,
    gpus: options.Gpus = 0,
    extend: options.Extend = False,
    retry: options.Retry = False,
    dry_run: options.DryRun = False,
    backend: options.Backend = "auto",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    memory: options.Memory = None,
) -> None:
    """Trace every sample of a data set, whatever happens meanwhile.

    The run is planned once, and each shard of it written for good when it is done: the same command, or
    `blip-trace sweep --out DIR` alone, goes on wherever the last one ended. Bad samples become rows with a
    reason.

    Exit codes: 0 done; 2 bad input, one sentence; 3 done, but some samples failed; 130 stopped (Ctrl-C,
    SIGTERM).
    """
    errors = Console(stderr=True)
    begin = time.monotonic()
    with one_sentence_errors(errors):
        order = None
        if data is None:
            _refuse_settings(context)
        with errors.status("loading torch and transformers"):
            from .sweep.driver import sweep as run
            from .sweep.executors import make_executor

            if data is not None:
                order = _order(context.params)
        bytes_allowed = None if memory is None else memory * 2**20
        if dry_run:
            assert order is not None
            with errors.status("planning"):
                from .sweep.planning import estimate

                found = estimate(order, order.tracer(bytes_allowed, threads))
            _print_estimate(found)
            return
        chosen = make_executor(executor, workers, address, gpus)
        with SweepProgress(errors) as progress:
            outcome = run(
                order,
                out,
                chosen,
                extend=extend,
                retry=retry,
                memory=bytes_allowed,
                threads=threads,
                reporter=progress,
            )
            rate = progress.rate
    _print_outcome(outcome, out, time.monotonic() - begin, rate)
    if outcome.stopped:
        raise typer.Exit(STOPPED)
    if outcome.failed:
        raise typer.Exit(FAILED_SAMPLES)


RunFolder = Annotated[
    str, typer.Argument(metavar="DIR", help="Folder or address of a run.", show_default=False)
]


def status(run: RunFolder) -> None:
    """Tell how far a run is, and whether somebody is at it. Changes nothing."""
    errors = Console(stderr=True)
    with one_sentence_errors(errors):
        from .sweep.plan import Plan
        from .sweep.store import SUCCESS, open_store
        from .sweep.verify import overview

        store = open_store(run)
        plan = Plan.load(store)
        receipts = overview(store, plan)
    done = sum(receipt.samples for receipt in receipts)
    statuses = sum((Counter(receipt.statuses) for receipt in receipts), Counter[str]())
    seconds = sum(receipt.seconds for receipt in receipts)
    shards = f"{len(receipts):,} of {len(plan.shards):,} shards"
    rows = {
        "run": plan.run_id,
        "data": str(plan.places["data"]),
        "model": str(plan.places["model"]),
        "samples": f"{done:,} of {plan.samples:,} done, in {shards}",
        "results": _counts(statuses),
        "complete": "yes, checked" if store.has(SUCCESS) else "no",
        "now": store.owner() or "nobody is at it",
    }
    if seconds:
        rows["work"] = f"{duration(seconds)} of one process, {done / seconds:.1f} samples a second"
    _print_rows(rows)


def verify(
    run: RunFolder,
) -> None:
    """Check all of a run: every planned sample once, every file as it was written, every page readable.

    Changes nothing. Exit codes: 0 complete and whole; 1 not complete or damaged, a line for each finding.
    """
    errors = Console(stderr=True)
    with one_sentence_errors(errors):
        from .sweep.plan import Plan
        from .sweep.store import open_store
        from .sweep.verify import examine

        store = open_store(run)
        plan = Plan.load(store)
        with errors.status("checking"):
            found = examine(store, plan, deep=True, repair=False)
    console = Console(highlight=False)
    problems = [*found.wrong, *(f"shard {number}: {reason}" for number, reason in found.open.items())]
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    console.print(
        f"{plan.samples:,} samples in {len(plan.shards):,} shards, all as they were written: "
        f"{_counts(found.statuses)}"
    )


def _refuse_settings(context: typer.Context) -> None:
    """Without data the run goes on as planned, and whatever would change it is a mistake."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in WHEN_RESUMING:
            raise ValueError(
                f"without --data a run goes on as it was planned: --{name.replace('_', '-')} cannot be given"
            )


def _order(given: dict[str, Any]) -> Order:
    from .sweep.planning import Order
    from .sweep.settings import Settings
    from .sweep.sources import open_data

    names, stacks = options.names, options.names(given["stacks"])
    noise = options.typed(given, options.CORRUPTION_OPTIONS)
    del noise["seed"]  # the run has one, from which each sample's is drawn
    if given["patch_group"] is not None and "vision" not in stacks:
        raise ValueError("--patch-group belongs to --stacks vision")
    settings = Settings(
        stacks=tuple(stacks) or None,
        kinds=tuple(names(given["kinds"])) or ("hidden",),
        window=given["window"],
        tokens=options.tokens_by_stack(names(given["tokens"]), stacks or ["text_encoder"]),
        direction=given["direction"],
        metrics=tuple(names(given["metrics"])) or ("probability",),
        sever=tuple(names(given["sever"])),
        patch_group=given["patch_group"] or 1,
        method=given["method"],
        method_options=options.typed(given, options.METHOD_OPTIONS),
        corrupt=tuple(names(given["corrupt"])) or ("embeddings",),
        corruption=noise,
        answer=given["answer"],
        only_correct=given["only_correct"],
        seed=given["seed"],
        store=given["store"],
        batch=given["batch"],
    )
    return Order(
        open_data(given["data"], given["format"], given["images"], given["split"]),
        model=given["model"],
        settings=settings,
        dtype=given["dtype"],
        backend=given["backend"],
        device=given["device"],
        limit=given["limit"],
        shard_size=given["shard_size"],
        on_error=given["on_error"],
    )


def _print_estimate(found: Estimate) -> None:
    _print_rows(
        {
            "samples": f"{found.samples:,} on {found.images:,} images",
            "cannot be traced": f"{found.problems:,}, known from the data alone",
            "shards": f"{found.shards:,}",
            "cells": f"{found.cells:,}",
            "time": f"about {duration(found.seconds)} in one process",
            "disk": f"about {found.bytes / 1e6:.1f} MB",
        }
    )


def _print_outcome(outcome: Outcome, out: str, seconds: float, rate: float) -> None:
    rows = {"results": _counts(outcome.statuses)}
    if rate:
        rows["took"] = f"{duration(seconds)}, {rate:.1f} samples a second"
    if outcome.stopped:
        done = sum(outcome.statuses.values())
        rows["stopped"] = (
            f"{done:,} of {outcome.plan.samples:,} samples are done: `blip-trace sweep --out {out}` goes on"
        )
    elif outcome.complete:
        rows["complete"] = (
            f"all {outcome.plan.samples:,} samples, checked; `blip-trace report {out}` shows them"
        )
    _print_rows(rows)


def _counts(statuses: Mapping[str, int]) -> str:
    told = [f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(statuses.items()) if count]
    return ", ".join(told) or "none yet"


def _print_rows(rows: dict[str, str]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value.replace("[", r"\["))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
