"""The schedule: runs share rows until they can differ, and a plan is a pure function of shapes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from blip_trace.runs import Job
from blip_trace.schedule import Plan, StackShape, plan
from blip_trace.sites import KINDS, Cell, Shape, Site, grid_cells, window_layers

LAYERS = 3
STEPS = tuple((layer, name) for layer in range(LAYERS) for name in ("self_attn", "cross_attn", "mlp"))
QUESTION, ANSWER = (
    StackShape("text_encoder", STEPS, 2, causal=False),
    StackShape("text_decoder", STEPS, 2, causal=True),
)


def job(cells: Iterable[Cell], tokens: int = 4, samples: int = 1) -> Job:
    """A question of so many tokens and an answer of one."""
    return Job((tokens, 1), range(1), samples, tuple(cells))


def planned(*jobs: Job) -> Plan:
    """A plan of questions about images of seven tokens."""
    return plan(None, (QUESTION, ANSWER), jobs, 7)


def grid(stack: str, kind: str, tokens: int, window: int = 1) -> list[Cell]:
    """All cells of a map."""
    shape = Shape(tokens, LAYERS, heads=2, source=7, causal=False)
    return grid_cells(stack, kind, [(token,) for token in range(tokens)], shape, window)


def rows(stack: str, kind: str, tokens: int = 4, samples: int = 1, window: int = 1) -> list[int]:
    """Rows of the question stack's batch at every step."""
    cells = grid(stack, kind, tokens if stack == "text_encoder" else 1, window)
    return [step.rows for step in planned(job(cells, tokens, samples)).stacks[0].steps]


def test_a_run_costs_nothing_before_it_forks() -> None:
    # one run until the image enters; clean and corrupted then; four tokens' runs more after each layer
    assert rows("text_encoder", "hidden") == [4, 8, 8] + [8 + 16] * 3 + [8 + 32] * 3


def test_runs_fork_at_the_sublayer_that_they_restore() -> None:
    assert rows("text_encoder", "cross_attn") == [4, 8, 24, 24, 24, 40, 40, 40, 56]


def test_samples_share_the_clean_run() -> None:
    assert rows("text_encoder", "hidden", samples=3)[-1] == 4 * (1 + 3 * (1 + 8))


def test_restoring_what_is_clean_already_makes_no_run() -> None:
    # no image has entered before the first cross-attention
    assert rows("text_encoder", "hidden_after_self_attn")[:3] == [4, 8, 8]


def test_decoder_cells_do_not_exist_in_the_question_stack() -> None:
    assert rows("text_decoder", "hidden") == [4, 8, 8, 8, 8, 8, 8, 8, 8]


def test_equal_cells_are_computed_once() -> None:
    cell = Cell.of([Site("text_encoder", 1, "hidden", 2)])
    once, twice = (planned(job([cell] * n)) for n in (1, 2))
    assert once.stacks[0].rows == twice.stacks[0].rows
    assert twice.answer_rows[0][2] == twice.answer_rows[0][3]


def test_a_whole_window_is_one_run() -> None:
    assert rows("text_encoder", "hidden", window=10)[-1] == 8 + 16  # all layers of a token: one cell


def test_a_restored_row_is_read_from_the_clean_run() -> None:
    cell = Cell.of([Site("text_encoder", 1, "mlp", 2)])
    step = planned(job([cell])).stacks[0].steps[5]
    assert step.residual_rows is not None
    assert step.update_rows is not None
    assert step.residual_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert step.update_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 2, 7]


def test_a_restored_head_is_mixed_into_a_row_of_its_own() -> None:
    heads = [Cell.of([Site("text_encoder", 1, "self_attn_head", 2, head)]) for head in (0, 1)]
    both = Cell.of(heads[0].sites | heads[1].sites)
    step = planned(job([*heads, both])).stacks[0].steps[3]
    assert step.head_rows is not None
    assert step.update_rows is not None
    # the corrupted run's token 2 is row 6 and the clean one's row 2; rows 8 to 10 are the mixed ones
    assert step.head_rows.tolist() == [[2, 6], [6, 2], [2, 2]]
    assert step.update_rows.tolist()[8:] == [4, 5, 8, 7, 4, 5, 9, 7, 4, 5, 10, 7]


def test_what_is_restored_behind_the_projection_stands() -> None:
    sites = [Site("text_encoder", 1, "self_attn_head", 2, 0), Site("text_encoder", 1, "self_attn", 2)]
    step = planned(job([Cell.of(sites)])).stacks[0].steps[3]
    assert step.update_rows is not None
    assert step.update_rows.tolist()[8:] == [4, 5, 2, 7]


def test_a_causal_stack_shares_what_comes_before_the_restored_token() -> None:
    cells = [Cell.of([Site("text_decoder", 0, "hidden", token)]) for token in range(5)]
    decoder = planned(Job((4, 5), range(5), 1, tuple(cells))).stacks[1]
    # the clean and the corrupted run whole, then from token t on what a restored token t changes
    assert decoder.layout.shared.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert decoder.rows == 10 + 5 + 4 + 3 + 2 + 1
    prefixes = decoder.steps[-1].prefixes
    assert prefixes is not None
    assert prefixes.tolist() == [[0, 0], [0, 0], [0, 0], [5, 1], [5, 2], [5, 3], [5, 4]]


def test_every_question_reads_its_own_image() -> None:
    cells = grid("text_encoder", "hidden", 2)
    step = planned(job(cells, 2, 2), job(cells, 5, 2)).stacks[0].steps[-2]
    assert step.query_starts is not None
    assert step.state_starts is not None
    assert step.state_starts.tolist() == [7 * n for n in range(7)]
    assert np.diff(step.query_starts.tolist()).tolist() == [2, 10, 10, 5, 25, 25]


def test_jobs_differ_by_their_cells() -> None:
    """Their hash does not look at them: that would take longer than planning saves."""
    cells = [Cell.of([Site("text_encoder", layer, "hidden", 0)]) for layer in (0, 1)]
    one, two, again = (Job((3, 1), range(1), 1, (cell,)) for cell in (*cells, cells[0]))
    assert one == again
    assert one != two
    assert hash(one) == hash(again)
    assert {one: "one", two: "two"}[again] == "one"


@pytest.mark.parametrize(
    ("layer", "window", "expected"),
    [
        (0, 1, [0]),
        (5, 1, [5]),
        (0, 3, [0, 1]),
        (5, 3, [4, 5, 6]),
        (11, 3, [10, 11]),
        (5, 10, list(range(10))),
    ],
)
def test_windows_follow_the_rule_of_rome(layer: int, window: int, expected: list[int]) -> None:
    assert list(window_layers(layer, window, 12)) == expected


def test_every_kind_names_a_sublayer_and_a_place() -> None:
    assert {kind.place for kind in KINDS.values()} == {"update", "stream", "head"}
    assert {kind.sublayer for kind in KINDS.values()} == {"self_attn", "cross_attn", "mlp"}
