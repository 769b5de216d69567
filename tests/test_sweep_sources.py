"""Data sets as they were published, imitated in small files: what becomes of their rows, good and bad."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from blip_trace import BackendUnavailableError
from blip_trace.cli import app
from blip_trace.cli_errors import one_sentence_errors
from blip_trace.sweep.describe import describe
from blip_trace.sweep.sample import Sample
from blip_trace.sweep.sources import FORMATS, DataSet, json_stream, open_data


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(grey: int = 0) -> bytes:
    data = BytesIO()
    PIL.Image.new("RGB", (4, 3), (grey, grey, grey)).save(data, "PNG")
    return data.getvalue()


def read(path: Path | str, *given: Any, **options: Any) -> list[Sample]:
    """All samples, which a second reading and one that is broken off repeat."""
    data = open_data(path, *given, **options)
    samples = list(data.samples())
    assert list(islice(data.samples(), 1)) == samples[:1]
    assert list(data.samples()) == samples
    for sample in samples:
        json.dumps(vars(sample), ensure_ascii=False).encode()  # no lone surrogates
        assert sample.id
        assert sample.problem is None or "\n" not in sample.problem
    return samples


def refused(path: Path | str, match: str, *given: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        list(open_data(path, *given, **options).samples())
    assert "\n" not in str(error.value)


# Tables in the normal form


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


def hf_table(rows: int = 5, **more: Any) -> pa.Table:
    """As Hugging Face writes images: structs, some of which name a file, and some of which are null."""
    cells: list[Any] = [{"bytes": png(row), "path": None} for row in range(rows)]
    cells[1] = {"bytes": None, "path": "file.png"}
    cells[2] = None
    columns = {"image": cells, "question": [f"q{row}" for row in range(rows)], "answers": [["a", "b"]] * rows}
    return pa.table({**columns, **more})


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


# Published sets


def coco_lines(folder: Path, questions: str, answers: str, images: str, types: str) -> None:
    for name, content in (
        ("questions", questions),
        ("answers", answers),
        ("img_ids", images),
        ("types", types),
    ):
        write(folder / f"{name}.txt", content)


def test_coco_qa_lines(tmp_path: Path) -> None:
    """Four aligned files in each split; pictures are found under any of their names, in any folder."""
    coco_lines(tmp_path / "train", "q one\nq two\n", "red\ntwo\n", "1\n2\n", "2\n1\n")
    coco_lines(tmp_path / "test", "q\n\nq\nq", "bed\nx\nx\nx", "3\n4\nx\n4", "3\n0\n0\n9")
    for name in ("train2014/COCO_train2014_000000000001.jpg", "COCO_val2014_000000000001.jpg",
                 "val2017/000000000002.jpg", "COCO_QA000000000003.jpg"):  # fmt: skip
        write(tmp_path / name, png())
    train = read(tmp_path, split="train")
    assert open_data(tmp_path).name == "coco-qa"
    assert train == [
        Sample("train-0", "train2014/COCO_train2014_000000000001.jpg", "q one", ("red",), "color"),
        Sample("train-1", "val2017/000000000002.jpg", "q two", ("two",), "number"),
    ]
    both = read(tmp_path)
    assert both[:2] == train
    assert both[2] == Sample("test-0", "COCO_QA000000000003.jpg", "q", ("bed",), "location")
    assert both[3].image == "000000000004.jpg"  # where there is none, so that it is told missing
    for sample, match in zip(both[3:], ("line 2: the question is empty", "'x' is no id of a COCO image",
                                        "'9' is no type of COCO-QA"), strict=True):  # fmt: skip
        assert match in (sample.problem or "")
    assert [sample.id for sample in read(tmp_path / "train")] == ["row-0", "row-1"]
    refused(tmp_path, "has no split 'val'; it has test, train", split="val")


def test_coco_qa_of_different_lengths(tmp_path: Path) -> None:
    """Files that are no longer aligned would give wrong answers to all that follows."""
    coco_lines(tmp_path, "a\nb\n", "a\n", "1\n2\n", "0\n0\n")
    refused(tmp_path, r"differ in their numbers of lines: questions.txt 2, answers.txt 1, img_ids.txt 2")
    (tmp_path / "types.txt").unlink()
    refused(tmp_path, r"has no file types\.txt")


COCO_CSV = ",train_image_id_count,question_count,answer_count\n"


def test_coco_qa_csv(tmp_path: Path) -> None:
    """The tables of the causal-tracing tool: their type is in the file's name."""
    write(
        tmp_path / "color_coco_qa.csv",
        COCO_CSV + "0,220218,what color,purple\n1,458864,q,brown\n2,-1,q,a\n3,,q,a\n",
    )
    write(tmp_path / "other.csv", COCO_CSV + "0,1,how many,two\n")
    write(tmp_path / "pictures" / "COCO_QA000000220218.jpg", png())
    color = read(tmp_path / "color_coco_qa.csv", images=tmp_path / "pictures")
    assert color[0] == Sample("0", "COCO_QA000000220218.jpg", "what color", ("purple",), "color")
    assert color[1].image == "000000458864.jpg"
    assert [sample.problem is None for sample in color] == [True, True, False, False]
    assert [sample.type for sample in read(tmp_path)] == ["color"] * 4 + [""]
    assert read(tmp_path, split="other")[0].question == "how many"
    assert open_data(tmp_path).name == open_data(tmp_path / "other.csv").name == "coco-qa"


def vqa(folder: Path, split: str, questions: Sequence[Mapping[str, Any]], annotations: Any = None) -> None:
    about = {"info": {"version": "2.0"}, "license": {"name": "x"}}
    write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
          json.dumps({**about, "data_subtype": split, "questions": questions}))  # fmt: skip
    if annotations is not None:
        write(folder / f"v2_mscoco_{split}_annotations.json",
              json.dumps({"x": [1, {}], "y": {"z": [2]}, "annotations": annotations}))  # fmt: skip


def annotation(id: int, *answers: str) -> dict[str, Any]:
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers)
    ]
    return {"question_id": id, "answers": people, "multiple_choice_answer": answers[0],
            "answer_type": "other", "question_type": "what is", "image_id": 1}  # fmt: skip


def test_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are joined with annotations in any order; answers stand by how many gave them; files are read
    in pieces."""
    monkeypatch.setattr(json_stream, "CHUNK", 7)
    questions = [
        {"question_id": id, "image_id": id % 3, "question": f"was {id} ü"} for id in (10, 11, 12, 13)
    ]
    annotations = [annotation(12, "c"), annotation(10, "down", "up", "in", "in"), annotation(11, "b")]
    vqa(tmp_path, "train2014", questions, annotations)
    vqa(tmp_path, "test-dev2015", questions[:1])
    write(tmp_path / "train2014" / "COCO_train2014_000000000001.jpg", png())
    assert open_data(tmp_path).name == "vqa-v2"
    samples = read(tmp_path, split="train")
    assert samples == read(tmp_path, split="train2014")
    assert samples[0] == Sample(
        "10", "train2014/COCO_train2014_000000000001.jpg", "was 10 ü", ("down", "in", "up"), "other",
        extra={"question_type": "what is"},
    )  # fmt: skip
    assert [sample.answers for sample in samples[1:3]] == [("b",), ("c",)]
    assert "v2_mscoco_train2014_annotations.json has no annotation of question 13" in (
        samples[3].problem or ""
    )
    assert read(tmp_path, split="test-dev") == [
        Sample("10", "train2014/COCO_train2014_000000000001.jpg", "was 10 ü")
    ]
    assert len(read(tmp_path)) == 5
    file = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert read(file) == samples
    refused(tmp_path / "v2_mscoco_train2014_annotations.json", "is no VQA v2", "vqa-v2")


def test_broken_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that ends too early, or goes on wrongly, is told; what came before it was read."""
    monkeypatch.setattr(json_stream, "CHUNK", 16)
    entry = json.dumps({"question_id": 1, "image_id": 1, "question": "q"})
    for name, text in (
        ("early", '{"questions": [' + entry + ", " + entry[:-5]),
        ("comma", '{"questions": [' + entry + " " + entry + "]}"),
        ("deep", '{"questions": [' + entry + ", " + "[" * 100_000 + "]"),
        ("number", '{"questions": [' + entry + ", 7]}"),
    ):
        path = write(tmp_path / f"{name}_questions.json", text)
        samples = open_data(path).samples()
        assert next(samples).id == "1"
        with pytest.raises(ValueError, match=rf"{name}_questions\.json (is no JSON|has an entry 1)"):
            next(samples)
    refused(write(tmp_path / "list.json", "[1]"), "is of no format that is known")
    refused(write(tmp_path / "text.json", "no"), "is of no format that is known")
    refused(write(tmp_path / "empty.json", ""), "is of no format that is known")


def test_json_reader_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the pieces of a file end, its entries are those of the whole."""
    content = {"a": 12345, "b": [1, -2.5e10, 'ü\\"]}'], "c": {"d": {}, "e": []}, "f": None, "g": "", "h": []}
    path = write(tmp_path / "a.json", json.dumps(content, indent=1))
    for size in range(1, 30):
        monkeypatch.setattr(json_stream, "CHUNK", size)
        assert dict(json_stream.object_entries(path)) == content
    monkeypatch.setattr(json_stream, "MAX_ENTRY", 10)
    with pytest.raises(ValueError, match="of entries of at most"):
        list(json_stream.object_entries(write(tmp_path / "b.json", '{"a": "' + "x" * 100 + '"}')))


def test_clevr(tmp_path: Path) -> None:
    """The published folder; a question's type is what its program asks for in the end."""
    question = {"split": "val", "image_filename": "CLEVR_val_000000.png", "question": "How many?",
                "answer": 3, "question_index": 5, "question_family_index": 2,
                "program": [{"function": "scene"}, {"function": "count"}]}  # fmt: skip
    write(
        tmp_path / "questions" / "CLEVR_val_questions.json", json.dumps({"info": {}, "questions": [question]})
    )
    untold = {"image_filename": "../../secret.png", "question": "?", "question_index": 0, "split": "../.."}
    write(tmp_path / "questions" / "CLEVR_test_questions.json", json.dumps({"questions": [untold]}))
    write(tmp_path / "images" / "val" / "CLEVR_val_000000.png", png())
    expected = Sample("5", "images/val/CLEVR_val_000000.png", "How many?", ("3",), "count",
                      extra={"question_family_index": "2"})  # fmt: skip
    assert open_data(tmp_path).name == "clevr"
    assert read(tmp_path, split="val") == [expected]
    file = open_data(tmp_path / "questions" / "CLEVR_val_questions.json")
    assert list(file.samples()) == [expected]
    assert file.media.exists(expected.image)
    hostile = open_data(tmp_path, split="test")
    (sample,) = hostile.samples()
    assert sample.answers == ()
    with pytest.raises(ValueError, match="leads out of the folder"):
        hostile.media.read(sample.image)


def test_clevr_csv(tmp_path: Path) -> None:
    """Python literals are parsed and never run, whatever they hold."""
    asked = [{"question": "Is it?", "answer": 1}, {"question": "Is it not?", "answer": 0}]
    ran = tmp_path / "ran"
    cells = [
        str(asked),
        f"[open({str(ran)!r}, 'w')]",
        "[" * 5000,
        "-" * 50_000 + "1",
        "[]",
        "[1]",
        "{",
        "'" + "x" * 110_000 + "'",
    ]
    rows = [f'{n},CLEVR_val_00000{n},"{cell}"\n' for n, cell in enumerate(cells)]
    path = write(tmp_path / "a.csv", ",Image_IDs,Questions_Answers\n" + "".join(rows))
    write(tmp_path / "images" / "val" / "CLEVR_val_000000.jpg", png())
    samples = read(path)
    assert open_data(path).name == "clevr"
    assert samples[:2] == [
        Sample("CLEVR_val_000000-0", "images/val/CLEVR_val_000000.jpg", "Is it?", ("yes",)),
        Sample("CLEVR_val_000000-1", "images/val/CLEVR_val_000000.jpg", "Is it not?", ("no",)),
    ]
    assert len(samples) == 9
    assert all(sample.problem for sample in samples[2:])
    assert "more than 100,000" in (samples[-1].problem or "")
    assert not ran.exists()
    write(tmp_path / "flat" / "b.csv", ",Image_IDs,Questions_Answers\n" + rows[0])
    write(tmp_path / "flat" / "CLEVR_val_000000.png", png())
    assert read(tmp_path / "flat")[0].image == "CLEVR_val_000000.png"


def test_gqa(tmp_path: Path) -> None:
    """Objects by question id, in several files."""
    entry = {"imageId": "n16", "question": "Is it red?", "answer": "no", "fullAnswer": "No, it is blue.",
             "isBalanced": True, "semantic": [{"operation": "select"}],
             "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}}  # fmt: skip
    write(tmp_path / "train_all_questions" / "train_all_questions_0.json", json.dumps({"07": entry}))
    write(tmp_path / "train_all_questions" / "train_all_questions_1.json", json.dumps({"08": entry, "09": 3}))
    write(tmp_path / "val_balanced_questions.json", json.dumps({"1": {"imageId": 5, "question": "q"}}))
    assert open_data(tmp_path).name == "gqa"
    samples = read(tmp_path, split="train_all")
    assert samples[0] == Sample("07", "n16.jpg", "Is it red?", ("no",), "verify",
                                extra={"full_answer": "No, it is blue.", "balanced": "true",
                                       "semantic_type": "attr"})  # fmt: skip
    assert [sample.id for sample in samples] == ["07", "08", "09"]
    assert samples[2].problem == "train_all_questions_1.json entry 1: it is no object"
    (tmp_path / "images").mkdir()
    assert read(tmp_path, split="val_balanced") == [Sample("1", "images/5.jpg", "q")]
    assert read(tmp_path / "val_balanced_questions.json", images=tmp_path / "images")[0].image == "5.jpg"
    refused(write(tmp_path / "a.json", '{"a": 1}'), "is no GQA", "gqa")


def test_svo_probes(tmp_path: Path) -> None:
    """A pair of pictures for each sentence; pictures are local files named by their ids."""
    write(
        tmp_path / "svo_probes.csv",
        "sentence,pos_triplet,neg_triplet,pos_url,neg_url,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\n"
        "A girl sits.,\"girl,sit,shore\",\"['girl', 'run', 'shore']\",http://a,http://b,1,2,False,True,False\n"
        "A man.,\"['[]']\",,http://a,http://b,3,,True,False,False\n",
    )
    write(tmp_path / "pictures" / "2.PNG", png())
    assert open_data(tmp_path).name == "svo-probes"
    first, second = read(tmp_path, images=tmp_path / "pictures")
    triplets = {"pos_triplet": "girl,sit,shore", "neg_triplet": "girl,run,shore"}
    assert first == Sample(
        "row-0", "1.jpg", "A girl sits.", ("match",), "verb_neg", corrupt_image="2.PNG", extra=triplets
    )
    assert "no image is named that does not match" in (second.problem or "")
    assert not second.extra
    refused(write(tmp_path / "b.csv", "sentence\n"), "is no SVO-Probes.*it has sentence", "svo-probes")


def test_mit_states(tmp_path: Path) -> None:
    """Folders of adjective and noun; each picture against one of the same thing in another state; what may be
    a pickle is not opened."""
    folder = tmp_path / "release_dataset" / "images"
    for name in ("old book", "new book", "ripe cherry tomato", "adj book", "burnt wood"):
        for number in range(2 if name == "old book" else 1):
            write(folder / name / f"{number}.jpg", png())
    write(folder / "new book" / "notes.txt", "x")
    write(tmp_path / "metadata_compositional-split-natural.t7", b"\x80\x04.")
    write(tmp_path / "compositional-split-natural" / "train_pairs.txt", "old book\nburnt wood\n")
    write(folder.parent / "compositional-split-natural" / "val_pairs.txt", "new book\n")
    assert open_data(tmp_path).name == open_data(folder).name == "mit-states"
    samples = read(tmp_path)
    assert [sample.image for sample in samples] == [
        "new book/0.jpg", "old book/0.jpg", "old book/1.jpg", "ripe cherry tomato/0.jpg", "burnt wood/0.jpg",
    ]  # fmt: skip
    name, question = "old book/1.jpg", "what kind of book is this"
    assert samples[2] == Sample(
        name, name, question, ("old",), "book", corrupt_image="new book/0.jpg", foil="new"
    )
    assert samples[3].question == "what kind of cherry tomato is this"
    assert samples[3].corrupt_image is None
    assert open_data(tmp_path).media.exists(samples[0].image)
    (only,) = read(tmp_path, split="val")
    assert (only.image, only.foil) == ("new book/0.jpg", None)
    refused(tmp_path, "has no split 'train'; it has val", split="train")
    refused(tmp_path / "compositional-split-natural", "is no MIT-States", "mit-states")


def test_hugging_face(tmp_path: Path) -> None:
    """Shards by split in a folder, and folders of images with a table beside them."""
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    (hub / ".cache").mkdir()
    for name in (
        "data/train-00000-of-00002",
        "data/train-00001-of-00002",
        "data/test-00000-of-00001",
        ".cache/x",
    ):
        pq.write_table(hf_table(), hub / f"{name}.parquet")
    data = open_data(hub, split="train")
    assert data.name == "huggingface"
    samples = list(data.samples())
    assert len(samples) == 10
    assert samples[5].image == "data/train-00001-of-00002.parquet#image/0"
    assert samples[5].id == "row-5"
    assert data.media.read(samples[9].image) == png(4)
    assert len(read(hub)) == 15
    refused(hub, "has no split 'val'; it has test, train", split="val")

    folder = tmp_path / "folder"
    write(folder / "train" / "metadata.csv", "file_name,question,answer\nsub/1.png,q,a\n/etc/passwd,q,a\n")
    write(folder / "test" / "metadata.jsonl", '{"file_name": "2.png", "question": "q"}\n')
    write(folder / "train" / "sub" / "1.png", png(1))
    data = open_data(folder)
    assert data.name == open_data(folder / "train" / "metadata.csv").name == "huggingface"
    assert [sample.image for sample in data.samples()] == ["test/2.png", "train/sub/1.png", "/etc/passwd"]
    assert data.media.read("train/sub/1.png") == png(1)
    assert len(read(folder, split="train")) == 2


def test_hub_cache(tmp_path: Path) -> None:
    """In the hub's cache files are links out of the snapshot, yet not out of the repository."""
    (tmp_path / "blobs").mkdir()
    pq.write_table(hf_table(), tmp_path / "blobs" / "abc")
    snapshot = tmp_path / "snapshots" / "main"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "train.parquet").symlink_to("../../../blobs/abc")
    write(snapshot / "file.png", png(7))
    data = open_data(snapshot)
    samples = list(data.samples())
    assert data.media.read(samples[0].image) == png(0)
    assert data.media.read(samples[1].image) == png(7)


def test_scenes() -> None:
    """A set that takes no space: the same for a seed, another for another."""
    samples = read("scenes:3")
    assert len(samples) == 15
    assert len({sample.id for sample in samples}) == 15
    assert [sample.image for sample in samples[::5]] == ["scene:0", "scene:1", "scene:2"]
    assert {sample.type for sample in samples} == {"color", "shape", "position", "count", "presence"}
    assert all(sample.answers for sample in samples)
    assert read("scenes:1:4")[0].image == "scene:4000000"
    assert open_data("scenes:1").media.exists("scene:0")
    for name in ("scenes:0", "scenes:", "scenes:1:-1", "scenes:1000001"):
        refused(name, "names no scenes")
    refused("scenes:1", "leave out --images", split="train")


# Which format


def test_unknown_formats(tmp_path: Path) -> None:
    """What cannot be told is asked for; nothing is guessed."""
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_data(tmp_path / "none")
    write(tmp_path / "a.csv", "image,question\n")
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        open_data(tmp_path / "a.csv", images=tmp_path / "none")
    refused(tmp_path, "is of no format that is known here, name it with --format: table .*; scenes")
    refused(tmp_path / "a.csv", "there is no format 'coco'; there are table, coco-qa", "coco")
    for name in FORMATS.keys() - {"table"}:
        refused(tmp_path / "a.csv", re.escape(str(tmp_path / "a.csv")), name)
    write(tmp_path / "both.csv", COCO_CSV.strip() + ",Image_IDs,Questions_Answers\n")
    refused(tmp_path / "both.csv", "could be coco-qa or clevr: say which with --format")


def test_without_torch() -> None:
    """Looking at data takes no seconds of imports."""
    script = (
        "import sys, blip_trace.cli, blip_trace.sweep.sources, blip_trace.sweep.describe\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Describing


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    rows = [
        "1,a.png,one two three,red,color,b.png,x,blue,y",
        "2,a.png,one,red,color,,,,",
        "2,missing.png,one two,blue,shape,gone.png,,,",
        "4,a.png,one,,,,,,",
        "5,a.png",
    ]
    head = "id,image,question,answer,type,corrupt_image,corrupt_question,foil,subject\n"
    write(tmp_path / "a.png", png())
    write(tmp_path / "b.png", png())
    return open_data(write(tmp_path / "a.csv", head + "\n".join(rows) + "\n"))


def test_describe(data: DataSet) -> None:
    """Every number, of a set small enough to count by hand."""
    found = describe(data).to_dict()
    assert found.pop("first_problems") == ["a.csv line 6: it has 2 columns, the header 9"]
    assert found == {
        "format": "table",
        "path": data.path,
        "samples": 5,
        "problems": 1,
        "repeated_ids": 1,
        "images": 4,
        "missing_images": 2,
        "first_missing": ["missing.png", "gone.png"],
        "questions_per_image": 2.0,
        "most_questions_per_image": 3,
        "question_words": 1.75,
        "most_question_words": 3,
        "types": 2,
        "common_types": {"color": 2, "shape": 1},
        "answers": 2,
        "common_answers": {"red": 2, "blue": 1},
        "without_answer": 1,
        "with_corrupt_image": 2,
        "with_corrupt_question": 1,
        "with_foil": 1,
        "with_subject": 1,
    }
    assert describe(data, limit=2).samples == 2


def test_describe_nothing(tmp_path: Path) -> None:
    """A table without rows has numbers too."""
    found = describe(open_data(write(tmp_path / "a.csv", "image,question\n")))
    assert (found.samples, found.images, found.questions_per_image) == (0, 0, 0.0)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "describe", *map(str, arguments)])


def test_command(data: DataSet) -> None:
    """What is printed, for people and for programs."""
    result = call(data.path)
    assert result.exit_code == 0, result.output
    for text in ("table", "missing.png", "a.csv line 6", "2: red 2, blue 1", "1.8, at most 3"):
        assert text in result.stdout
    result = call(data.path, "--json", "--limit", 3)
    assert json.loads(result.stdout) == describe(data, 3).to_dict()
    assert call("scenes:2", "--format", "scenes").exit_code == 0


def test_markup_of_the_data(tmp_path: Path) -> None:
    """Texts of the data are printed as they are, not taken as the terminal's markup."""
    write(tmp_path / "[red].csv", "image,question,answer\n[bold]x.png,q,[/bold]\n")
    result = call(tmp_path / "[red].csv")
    assert result.exit_code == 0, result.output
    for text in ("[red].csv", "[bold]x.png", "[/bold] 1"):
        assert text in result.stdout


def test_command_refuses(tmp_path: Path) -> None:
    """Bad input: exit code 2 and one sentence."""
    write(tmp_path / "a.csv", "text\nx\n")
    for arguments, match in (
        ((tmp_path / "none",), "there is no file or folder"),
        ((tmp_path / "a.csv",), "name it with --format"),
        ((tmp_path / "a.csv", "--format", "table"), "has no column image"),
        ((tmp_path / "a.csv", "--format", "nonsense"), "there is no format 'nonsense'"),
        (("scenes:x",), "names no scenes"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.strip().splitlines()) == 1
        assert match in result.stderr
        assert not result.stdout


def test_one_sentence_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that is not there is bad input too; other runtime errors are bugs and stay visible."""
    for error, code in ((BackendUnavailableError("not\nbuilt"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(typer.Exit) as end, one_sentence_errors(Console(stderr=True)):
            raise error
        assert end.value.exit_code == code
    assert capsys.readouterr().err == "blip-trace: not built\ninterrupted\n"
    with pytest.raises(RuntimeError, match="bug"), one_sentence_errors(Console(stderr=True)):
        raise RuntimeError("bug")
