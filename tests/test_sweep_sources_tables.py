"""Tables of questions in the normal form: what becomes of their rows, good and bad."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sweep_data import hf_table, png, read, refused, write

from blip_trace.sweep.sample import Sample
from blip_trace.sweep.sources import open_data


def test_csv(tmp_path: Path) -> None:
    """Every column of the normal form; further ones are extra."""
    write(
        tmp_path / "a.csv",
        "\ufeffid,image,question,answers,type,corrupt_image,corrupt_question,foil,subject,source\r\n"
        '7,a.png,"what, is\nit ",cat,animal,b.png,what is this,dog,it,web\r\n'
        '8,b.png,was ist größer 🐈,"[""zwei"", ""2"", ""zwei""]",,,,,,\r\n',
    )
    first, second = read(tmp_path / "a.csv")
    assert first == Sample(
        id="7",
        image="a.png",
        question="what, is\nit",
        answers=("cat",),
        type="animal",
        corrupt_image="b.png",
        corrupt_question="what is this",
        foil="dog",
        subject="it",
        extra={"source": "web"},
    )
    assert second == Sample("8", "b.png", "was ist größer 🐈", ("zwei", "2"))


def test_aliases(tmp_path: Path) -> None:
    """Other names for columns, in any case; an unnamed one is an id; images are relative to the file."""
    write(
        tmp_path / "a.tsv",
        "\tImage_Path\tQuestion\tAnswer\tquestion_type\tfoil_answer\timage_id\n5\tx.png\tq\ta\tt\tf\t9\n",
    )
    assert read(tmp_path / "a.tsv") == [
        Sample("5", "x.png", "q", ("a",), "t", foil="f", extra={"image_id": "9"})
    ]
    write(tmp_path / "x.png", png())
    assert open_data(tmp_path / "a.tsv").media.read("x.png") == png()
    (tmp_path / "pictures").mkdir()
    assert not open_data(tmp_path / "a.tsv", images=tmp_path / "pictures").media.exists("x.png")


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    """Each bad row keeps its place, with its line and the reason; those after it are read."""
    write(
        tmp_path / "a.csv",
        b"id,image,question\n"
        b"1,a.png,good\n"
        b"2,a.png\n"
        b"3,a.png,caf\xe9\n"
        b"4,,what\n"
        b"5,a.png,  \n"
        b"\n"
        b'6,a.png,"never closed\n'
        b"7,a.png,good\n"
        b"8,a.png,too,many\n"
        b",a.png,good\n"
        b"7,a.png," + b"x" * 200_000 + b"\n"
        b"7,a.png,good\n",
    )
    samples = read(tmp_path / "a.csv")
    problems = [sample.problem or "" for sample in samples]
    for number, match in {
        1: r"a\.csv line 3: it has 2 columns, the header 3",
        2: r"a\.csv line 4: it is not UTF-8",
        3: r"a\.csv line 5: no image",
        4: r"a\.csv line 6: the question is empty",
        5: r"a\.csv line 8: it is no CSV",
        7: r"a\.csv line 10: it has 4 columns",
        9: r"a\.csv line 12: it is no CSV: field larger",
    }.items():
        assert re.match(match, problems[number])
    assert [number for number, problem in enumerate(problems) if not problem] == [0, 6, 8, 10]
    assert [sample.id for sample in samples][:5] == ["1", "row-1", "3", "4", "5"]
    assert samples[8].id == "row-8"
    assert samples[6].id == samples[10].id == "7"  # the planner makes them unique
    assert samples[2].question == "caf?"


def test_json_lines(tmp_path: Path) -> None:
    """Objects with other keys each, numbers, lists and structs; broken lines are told by number."""
    lines = [
        {
            "id": 1,
            "image": "a.png",
            "question": "q",
            "answer": "main",
            "answers": ["main", {"answer": "other"}],
        },
        {"image": {"path": "b.png"}, "question": "q" * 50_000, "answer": 3, "big": {"a": [1]}, "none": None},
        {"id": None, "image": "a.png", "question": "lone \ud83d"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n\n{"image": \n[1]\n' + "[" * 100_000 + '\n{"id": "last"}\n'
    first, second, lone, *bad = read(write(tmp_path / "a.jsonl", text))
    assert first == Sample("1", "a.png", "q", ("main", "other"))
    assert second == Sample("row-1", "b.png", "q" * 50_000, ("3",), extra={"big": '{"a": [1]}'})
    assert lone.problem == "a.jsonl line 3: it is not UTF-8"
    assert [sample.id for sample in bad] == ["row-3", "row-4", "row-5", "last"]
    expected = ("5: it is no JSON: ", "6: it is no JSON object", "7: it is no JSON: ", "8: the question is")
    for sample, match in zip(bad, expected, strict=True):
        assert f"a.jsonl line {match}" in (sample.problem or "")


def test_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line without end is not held; the next one is read."""
    monkeypatch.setattr("blip_trace.sweep.sources.rows.MAX_LINE", 100)
    good = '{"image": "a.png", "question": "q"}\n'
    samples = read(write(tmp_path / "a.jsonl", good + '{"image": "' + "x" * 1000 + '"}\n' + good))
    assert [sample.problem is None for sample in samples] == [True, False, True]


def test_parquet(tmp_path: Path) -> None:
    """Images in cells become references to them, and are never read as long as only the rows are."""
    write(tmp_path / "file.png", png(77))
    pq.write_table(
        hf_table(question_id=pa.array([1, 2, None, 4, 5])), tmp_path / "a.parquet", row_group_size=3
    )
    data = open_data(tmp_path / "a.parquet")
    samples = read(tmp_path / "a.parquet")
    assert data.name == "huggingface"
    assert [sample.image for sample in samples] == [
        "a.parquet#image/0", "file.png", "", "a.parquet#image/3", "a.parquet#image/4",
    ]  # fmt: skip
    assert [sample.id for sample in samples] == ["1", "2", "row-2", "4", "5"]
    assert [data.media.read(samples[row].image) for row in (0, 1, 4)] == [png(0), png(77), png(4)]
    assert samples[2].problem == "a.parquet row 2: no image is named"
    assert samples[0].answers == ("a", "b")
    assert read(tmp_path / "a.parquet", "table") == samples
    (tmp_path / "other").mkdir()
    refused(tmp_path / "a.parquet", "holds its images itself: leave out --images", images=tmp_path / "other")


def test_parquet_of_names(tmp_path: Path) -> None:
    """Structs of answers, as in the hub's VQAv2; no statistics; binary cells; names of files."""
    answers = [[{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}]]
    columns = {
        "img": ["a.png"],
        "question": ["q"],
        "answers": answers,
        "multiple_choice_answer": ["y"],
        "n": [1.5],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert open_data(tmp_path / "a.parquet").name == "table"
    assert read(tmp_path / "a.parquet") == [Sample("row-0", "a.png", "q", ("y", "x"), extra={"n": "1.5"})]
    binary = pa.table({"image": [png(), None], "question": ["q", "q"], "corrupt_image": [None, png()]})
    pq.write_table(binary, tmp_path / "b.parquet", write_statistics=False)
    first, second = read(tmp_path / "b.parquet")
    assert (first.image, first.corrupt_image) == ("b.parquet#image/0", None)
    assert (second.image, second.corrupt_image) == ("", "b.parquet#corrupt_image/1")


def test_broken_parquet(tmp_path: Path) -> None:
    """Of a row group that cannot be read each row is bad, and the next group is read; a broken footer, or
    foreign columns, are told of the file."""
    path = tmp_path / "a.parquet"
    table = pa.table({"image": ["a.png"] * 4, "question": [f"a question {n} " * 20 for n in range(4)]})
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, row_group_size=2, write_page_checksum=True, **options)
    data = bytearray(path.read_bytes())
    data[data.index(b"a question 1") + 3] ^= 1
    path.write_bytes(data)
    samples = read(path)
    assert [sample.id for sample in samples] == ["row-0", "row-1", "row-2", "row-3"]
    assert [sample.problem is None for sample in samples] == [False, False, True, True]
    assert (samples[1].problem or "").startswith("a.parquet row 1: its part of the file is broken")

    refused(write(tmp_path / "b.parquet", data[:-20]), r"b\.parquet is no whole Parquet file", "table")
    pq.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", r"c\.parquet has no column question; it has 'image', 'text'", "table")
    pq.write_table(pa.table({"image": ["a"], "question": [b"b"]}), tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "holds bytes in its column 'question', not text", "table")


def test_foreign_tables(tmp_path: Path) -> None:
    """Files that are no tables of questions are refused as a whole."""
    for name, content, match in (
        ("a.csv", "", "is empty"),
        ("b.csv", "image,text\na,b\n", "has no column question"),
        ("c.csv", "image,question,image\n", "two columns 'image'"),
        ("d.jsonl", "no json\n" * 200, "no JSON objects"),
        ("e.jsonl", '{"question": "q"}\n', "has no column image or image_path"),
        ("f.txt", "image,question\n", "is no table"),
    ):
        refused(write(tmp_path / name, content), match, "table")
    refused(
        write(tmp_path / "g.csv", "image,question\na,b\n"), "has no splits: leave out --split", split="train"
    )
