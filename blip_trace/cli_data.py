"""`blip-trace data`: what is in a data set, before it is traced."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cli_errors import one_sentence_errors

if TYPE_CHECKING:
    from .sweep.describe import Description

data_app = typer.Typer(
    help="Data sets of questions about images, as they lie on disk.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="table, coco-qa, vqa-v2, clevr, gqa, svo-probes, mit-states, huggingface or scenes.",
        show_default="found out",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder that the images lie in.", show_default="that of the data", metavar="DIR"),
]
Split = Annotated[str | None, typer.Option(help="One of its splits, such as train.", show_default="all")]


@data_app.command()
def describe(
    path: Annotated[str, typer.Argument(help="File or folder, or scenes:COUNT or scenes:COUNT:SEED.")],
    format: Format = None,
    images: Images = None,
    split: Split = None,
    limit: Annotated[
        int | None, typer.Option(help="Read only so many samples.", show_default="all", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what a data set holds, and tell what is missing or wrong.

    Reads all rows and looks whether their images are there; opens no image and needs no model. Rows that
    cannot be traced are counted as problems; what is broken as a whole ends with exit code 2.
    """
    errors = Console(stderr=True)
    with one_sentence_errors(errors):
        with errors.status("reading"):
            from .sweep.describe import describe as count
            from .sweep.sources import open_data

            found = count(open_data(path, format, images, split), limit)
        if as_json:
            print(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
        else:
            _print(Console(width=None if sys.stdout.isatty() else 120, highlight=False), found)


def _print(console: Console, found: Description) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "format": found.format,
        "samples": f"{found.samples:,}",
        "problems": _with_examples(found.problems, found.first_problems),
        "repeated ids": f"{found.repeated_ids:,}",
        "images": f"{found.images:,}",
        "missing images": _with_examples(found.missing_images, found.first_missing),
        "questions per image": f"{found.questions_per_image:.1f}, at most {found.most_questions_per_image:,}",
        "words in a question": f"{found.question_words:.1f}, at most {found.most_question_words:,}",
        "types": _with_counts(found.types, found.common_types),
        "answers": _with_counts(found.answers, found.common_answers),
        "without answer": f"{found.without_answer:,}",
        "with corrupt image": f"{found.with_corrupt_image:,}",
        "with corrupt question": f"{found.with_corrupt_question:,}",
        "with foil": f"{found.with_foil:,}",
        "with subject": f"{found.with_subject:,}",
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))  # texts of the data are no markup
    console.print(Text(found.path, style="bold"), soft_wrap=True)
    console.print(table)


def _with_examples(count: int, first: list[str]) -> str:
    more = [f"and {count - len(first):,} more"] if count > len(first) else []
    return "\n".join([f"{count:,}", *first, *more])


def _with_counts(count: int, common: dict[str, int]) -> str:
    told = ", ".join(f"{text} {number:,}" for text, number in common.items())
    more = ", …" if count > len(common) else ""
    return f"{count:,}: {told}{more}" if common else f"{count:,}"
