"""Data sets as they were published, imitated in small files: what becomes of their rows, good and bad."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sweep_data import COCO_CSV, hf_table, png, read, refused, write

from blip_trace.sweep.sample import Sample
from blip_trace.sweep.sources import json_stream, open_data


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
