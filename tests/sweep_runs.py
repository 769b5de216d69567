"""Runs made up for tests: ragged maps with planted effects, in several files, with all that can go wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from blip_trace.sites import HEAD_KINDS
from blip_trace.sweep import parquet, schema
from blip_trace.sweep.roles import roles_of

LAYERS, HEADS = 4, 2
THINGS = ("dog", "cat", "gi ##raf ##fe", "man in the red hat")
LAYOUT = schema.Layout(
    run_id="0123456789ab",
    stacks=(schema.StackLayout("text_encoder", LAYERS), schema.StackLayout("text_decoder", LAYERS)),
    kinds=("hidden", "cross_attn_head"),
    metrics=("probability", "logit"),
    spread=True,
    store="float32",
    direction="denoise",
)
Row = dict[str, Any]


def make_rows(count: int, layout: schema.Layout = LAYOUT, seed: int = 0) -> list[Row]:
    """Mostly ok; color questions have 0.4 more effect at their content, in the last layer."""
    rng = np.random.default_rng(seed)
    return [_row(number, layout, rng) for number in range(count)]


def _row(number: int, layout: schema.Layout, rng: np.random.Generator) -> Row:
    kind = ("color", "count", "yes/no")[number % 3]
    thing = THINGS[rng.integers(len(THINGS))]
    question = {
        "color": f"what color is the {thing} ?",
        "count": f"how many {thing} are there ?",
        "yes/no": f"is there a {thing} ?",
    }[kind]
    row: Row = {
        "sample_id": f"q{number:06d}",
        "status": "ok",
        "image": f"images/{number // 3}.png",
        "question": question,
        "type": kind,
        "answers": ["red"],
        "extra": json.dumps({"part": "train" if number % 2 else "val"}),
        "model_answer": "red",
        "correct": number % 4 != 1,
        "answer": "red",
        "answer_ids": [11],
        "corrupted": "noise",
        "seed": number,
        "samples": 10,
        "total_effect_vanishes": number % 11 == 5,
    }
    if number % 13 == 3:
        row |= {"status": "error", "reason": f"image {number % 2} cannot be decoded", "correct": None}
    elif number % 17 == 4:
        row |= {"status": "filtered", "correct": False}
    elif number % 19 == 6:
        row["status"] = "not_finite"
    for metric in layout.metrics:
        high = rng.uniform(0.6, 1.0)
        row[f"{metric}_high"] = high
        row[f"{metric}_low"] = high if row["total_effect_vanishes"] else rng.uniform(0, 0.3)
        if layout.spread:
            row[f"{metric}_low_se"] = 0.01
    if row["status"] in ("error", "filtered"):
        return row
    for stack in layout.stacks:
        if stack.name == "vision":
            tokens = ("class", "0,0", "0,1", "1,0", "1,1")
        elif stack.name == "text_encoder":
            tokens = ("[CLS]", *question.split(), "[SEP]")
        else:
            tokens = ("[DEC]",)
        roles = roles_of(stack.name, tokens, {"[CLS]", "[SEP]", "[DEC]"})
        row[f"{stack.name}_tokens"], row[f"{stack.name}_roles"] = tokens, roles
        row[f"{stack.name}_positions"] = list(range(len(tokens)))
        planted = np.array([[0.4 * (kind == "color" and role == "content")] for role in roles])
        for name in layout.kinds:
            for metric in layout.metrics:
                shape = (HEADS,) * (name in HEAD_KINDS) + (len(tokens), stack.layers)
                values = row[f"{metric}_low"] + rng.normal(0.1, 0.1, shape)
                values[..., -1:] += planted
                if row["status"] == "not_finite":
                    values[..., 0, 0] = np.nan
                column = layout.map_column(stack.name, name, metric)
                row[column] = values.astype(layout.store).tolist()
                if layout.spread:
                    row[f"{column}_se"] = np.full(shape, 0.02).tolist()
    return row


def write_run(
    folder: Path, rows: Sequence[Row], borders: Sequence[int] = (), layout: schema.Layout = LAYOUT
) -> Path:
    """A complete run whose files end before these rows."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    ends = (0, *borders, len(rows))
    parts = [rows[first:last] for first, last in pairwise(ends)]
    for number, part in enumerate(parts):
        data = parquet.encode(schema.table_of(layout, part))
        (shards / f"{number:06d}.parquet").write_bytes(data)
    plan = {
        "run_id": layout.run_id,
        "settings": {"model": "blip-shapes", "corruption": {"kind": "noise", "samples": 10}},
        "samples": len(rows),
        "shards": [{"number": number, "samples": len(part)} for number, part in enumerate(parts)],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "_SUCCESS").touch()
    return folder
