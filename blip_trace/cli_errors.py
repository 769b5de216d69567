"""How commands end on bad input: one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


@contextmanager
def one_sentence_errors(console: Console) -> Iterator[None]:
    """Turn what bad input raises into one line and exit code 2, and Ctrl-C into 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError) as error:
        _end(console, error)
    except RuntimeError as error:
        from .ops import BackendUnavailableError  # here, since it needs torch, and not every command does

        if not isinstance(error, BackendUnavailableError):
            raise
        _end(console, error)


def _end(console: Console, error: Exception) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    console.print(f"blip-trace: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None
