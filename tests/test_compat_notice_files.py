"""What NOTICE reads and writes: tables of questions, the published sets, rows of results, circuits."""

from __future__ import annotations

import csv
import json
import pickle
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_compat_notice import (
    CLEAN,
    HEADS,
    INPUTS,
    LAYERS,
    OTHER,
    QUESTION,
    SWAPPED,
    TOLERANCE,
    answers,
    flow,
    model,
    notice_columns,
    tracer,
)

from blip_trace import Tracer
from blip_trace.compat import notice
from blip_trace.compat.models import UnsupportedError
from blip_trace.scenes import random_scene

# Tables of questions


def table(tmp_path: Path, count: int = 3) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        for name, seed in (("clean", 3 + number), ("corrupt", 4 + number)):
            random_scene(Random(seed)).render(64).save(tmp_path / f"{name}{number}.png")
        made.append(
            {
                "clean_image_path": str(tmp_path / f"clean{number}.png"),
                "corrupt_image_path": str(tmp_path / f"corrupt{number}.png"),
                "clean_prompt": QUESTION,
                "corrupt_prompt": SWAPPED,
                "correct_answer": "circle",
                "incorrect_answer": "square",
            }
        )
    return made


@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("pandas", [False, True])
def test_every_row_of_a_table(mode: str, pandas: bool, tmp_path: Path) -> None:
    df: Any = table(tmp_path)
    if pandas:
        df = pytest.importorskip("pandas").DataFrame(df)
    found = notice.debug_hidden_flow(*model(), df, "text_encoder", "output", 0, LAYERS, mode)
    assert len(found) == 3
    assert torch.equal(found[0]["scores"], flow(mode, "output")["scores"])
    assert found[0]["scores"].sub(found[1]["scores"]).abs().max() > 1e-3


def test_every_head_of_every_row(tmp_path: Path) -> None:
    kind = "crossattention_block"
    found = notice.debug_head_flows(*model(), table(tmp_path), "text_encoder", kind, 0, LAYERS, "image")
    assert (len(found), len(found[0])) == (HEADS, 3)
    job = notice.debug_hidden_flow(*model(), table(tmp_path), "text_encoder", kind, 0, LAYERS, "image", 2)
    for own, expected in zip(found[2], job, strict=True):
        assert own.keys() == expected.keys()
        assert (own["scores"] - expected["scores"]).abs().max() <= TOLERANCE


def test_images_by_their_addresses(tmp_path: Path) -> None:
    """Tensors as torchvision's ToTensor makes them, or anything that is traced."""
    rows = table(tmp_path, 1)
    pixels = torch.from_numpy(np.array(CLEAN)).permute(2, 0, 1)
    for clean in (pixels / 255, pixels, CLEAN, rows[0]["clean_image_path"]):
        images = {"https://a/1.jpg": clean, "https://a/2.jpg": OTHER}
        row = {**rows[0], "clean_image_path": "https://a/1.jpg", "corrupt_image_path": "https://a/2.jpg"}
        (found,) = notice.debug_hidden_flow(
            *model(), [row], "text_encoder", None, 0, LAYERS, "image", image_tensors=images
        )
        assert torch.equal(found["scores"], flow()["scores"])


def test_rows_without_a_difference_are_counted(tmp_path: Path) -> None:
    rows = table(tmp_path, 2)
    rows[1]["corrupt_image_path"] = rows[1]["clean_image_path"]
    with pytest.warns(UserWarning, match="in 1 of 2 rows the corruption leaves") as caught:
        notice.debug_hidden_flow(*model(), rows, "text_encoder", None, 0, 1, "image")
    assert [own.filename for own in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice.debug_hidden_flow(*model(), rows[:1], "text_encoder", None, 0, 1, "image")


@pytest.mark.parametrize(
    ("changes", "mode", "match"),
    [
        ({"clean_prompt": ""}, "image", "row 1 has no clean_prompt"),
        ({"incorrect_answer": float("nan")}, "image", "row 1 has no incorrect_answer"),
        ({"corrupt_prompt": None}, "text", "row 1 has no corrupt_prompt"),
        ({"corrupt_image_path": "gone.png"}, "both", "row 1 has the corrupt_image_path 'gone.png'"),
        ({"corrupt_prompt": "what shape is it"}, "text", "row 1: a prompt of 9 tokens against one of 6"),
        ({"correct_answer": "zebra"}, "image", "row 1: the model does not know the correct_answer 'zebra'"),
    ],
)
def test_bad_rows_are_named_before_any_is_traced(
    changes: dict[str, Any], mode: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table(tmp_path)
    rows[1].update(changes)
    monkeypatch.setattr(Tracer, "restore", lambda *args, **given: pytest.fail("traced"))
    with pytest.raises((ValueError, UnsupportedError), match=match) as raised:
        notice.debug_hidden_flow(*model(), rows, "text_encoder", None, 0, LAYERS, mode)
    assert "\n" not in str(raised.value)


# NOTICE's own tables, and the published sets


def picture(path: Path, seed: int = 3) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_scene(Random(seed)).render(64).save(path)
    return str(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_of_notice_s(tmp_path: Path) -> None:
    """Names of images are taken from the file's folder or another, addresses are left alone."""
    row = {
        "clean_image_path": "clean0.png",
        "corrupt_image_path": "https://a/2.jpg",
        "clean_prompt": QUESTION,
        "corrupt_prompt": SWAPPED,
        "correct_answer": "circle",
        "incorrect_answer": "square",
        "noun": "shape",
    }
    path = write_csv(tmp_path / "BLIP_final_mit_states.csv", [row])
    picture(tmp_path / "clean0.png")
    picture(tmp_path / "elsewhere" / "clean0.png", 4)
    for images in (None, tmp_path / "elsewhere"):
        (read,) = notice.read_rows(path, images)
        assert read == {**row, "clean_image_path": str((images or tmp_path) / "clean0.png")}
    (found,) = notice.debug_hidden_flow(
        *model(), notice.read_rows(path), "text_encoder", None, 0, LAYERS, "text"
    )
    assert torch.equal(found["scores"], flow("text")["scores"])
    with path.open("a") as file:
        file.write("too,short\n")
    with pytest.warns(UserWarning, match="1 rows of .* are left out: .* line 3: it has 2 columns"):
        assert len(notice.read_rows(path)) == 1


SVO = {
    "sentence": "A girl stands",
    "pos_triplet": "girl,stand,grass",
    "neg_triplet": "girl,sit,grass",
    "pos_image_id": "1",
    "neg_image_id": "2",
    "subj_neg": "False",
    "verb_neg": "True",
    "obj_neg": "False",
}


def test_svo_probes(tmp_path: Path) -> None:
    """A forced choice about each of the two pictures."""
    rows = [
        SVO,
        {**SVO, "neg_triplet": "['[]']"},
        {**SVO, "neg_triplet": "['girl,sit,grass', 'x,y,z']", "neg_image_id": "3"},
        {**SVO, "neg_image_id": ""},
    ]
    write_csv(tmp_path / "svo_probes.csv", rows)
    for name in "12":
        picture(tmp_path / "pictures" / f"{name}.jpg")
    with pytest.warns(UserWarning, match="2 rows of"):
        read = notice.read_rows(tmp_path / "svo_probes.csv", tmp_path / "pictures")
    assert len(read) == 4
    assert [row["clean_prompt"] for row in read] == ["is girl stand or sit grass?"] * 4
    first, second = read[:2]
    pictures = [str(tmp_path / "pictures" / f"{name}.jpg") for name in "12"]
    assert [first["clean_image_path"], first["corrupt_image_path"]] == pictures
    assert [second["clean_image_path"], second["corrupt_image_path"]] == pictures[::-1]
    assert (first["correct_answer"], first["incorrect_answer"]) == ("stand", "sit")
    assert (second["correct_answer"], second["incorrect_answer"]) == ("sit", "stand")
    assert read[2]["corrupt_image_path"] == "3.jpg"  # is not there


def test_mit_states(tmp_path: Path) -> None:
    folder = tmp_path / "release_dataset" / "images"
    for name in ("old door/1.jpg", "old door/2.jpg", "new door/3.jpg", "adj door/4.jpg", "ripe kiwi/5.jpg"):
        picture(folder / name)
    with pytest.warns(UserWarning, match="1 rows of .*ripe kiwi/5.jpg is half of a pair"):
        read = notice.read_rows(tmp_path)
    assert [row["clean_prompt"] for row in read] == [
        "Is this door new or old?",
        "Is this door new or old?",
        "Is this door old or new?",
    ]
    assert [row["correct_answer"] for row in read] == ["new", "old", "old"]
    assert [row["correct_first"] for row in read] == ["True", "False", "True"]
    assert Path(read[0]["corrupt_image_path"]).parent.name == "old door"
    assert all(
        Path(row[name]).is_file() for row in read for name in ("clean_image_path", "corrupt_image_path")
    )


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,question\n1.png,what\n")
    with pytest.raises(ValueError, match=r"a\.csv is no input of NOTICE's"):
        notice.read_rows(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError):
        notice.read_rows(tmp_path / "b.csv")
    (tmp_path / "image_tensors.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(ValueError, match="is of no format that is known"):
        notice.read_rows(tmp_path / "image_tensors.pkl")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("girl,sit,grass", ["girl", "sit", "grass"]),
        ("['girl,sit,grass', 'a,b,c']", ["girl", "sit", "grass"]),
        ("['[]']", ["[]"]),
        ("[", ["["]),
        ("", [""]),
        ("[" * 9999, ["[" * 9999]),
    ],
)
def test_triplets(cell: str, words: list[str]) -> None:
    assert notice.parse_triplet(cell) == words


def test_incorrect_answers() -> None:
    rows = [{**SVO, "correct_answer": "Stand"}, {**SVO, "correct_answer": "sit", "verb_neg": True}]
    assert notice.get_incorrect_answers(rows) == ["sit", "stand"]
    assert notice.get_incorrect_answers(pytest.importorskip("pandas").DataFrame(rows)) == ["sit", "stand"]
    with pytest.raises(ValueError, match="row 1 has no triplets"):
        notice.get_incorrect_answers([rows[0], {**rows[1], "verb_neg": "False"}])


def test_incorrect_answers_of_a_table_are_made_where_they_lack(tmp_path: Path) -> None:
    (row,) = table(tmp_path, 1)
    row.pop("incorrect_answer")
    row.update(SVO, pos_triplet="circle,is,in", neg_triplet="square,is,in", subj_neg="True", verb_neg="False")
    (found,) = notice.debug_hidden_flow(*model(), [row], "text_encoder", None, 0, LAYERS, "image")
    assert found["incorrect_token"] == answers()[1]


# Rows of results


def results(tmp_path: Path) -> list[dict[str, Any]]:
    rows = table(tmp_path, 2)
    rows[1]["corrupt_image_path"] = rows[1]["clean_image_path"]
    with pytest.warns(UserWarning, match="in 1 of 2 rows"):
        own = notice.debug_hidden_flow(
            *model(), rows, "text_encoder", "attention_block", 0, LAYERS, "image", attn_head=0
        )
    return [*own, flow()]  # one has NaN, one has no kind and no head


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".csv"])
def test_results_come_back_as_they_were(suffix: str, tmp_path: Path) -> None:
    made = results(tmp_path)
    path = tmp_path / f"rows{suffix}"
    notice.save_rows(made, path)
    read = notice.load_rows(path)
    assert [list(row) for row in read] == [notice_columns()] * 3
    for own, back in zip(made, read, strict=True):
        for name in notice_columns():
            if name in ("scores", "low_score"):
                torch.testing.assert_close(back[name], own[name], rtol=0, atol=0, equal_nan=True)
                assert back[name].dtype == torch.float32
            else:
                assert back[name] == own[name]
    assert read[1]["scores"][..., 3].isnan().all()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".part")]


def test_results_open_in_other_programs(tmp_path: Path) -> None:
    made = results(tmp_path)
    for suffix in (".parquet", ".json", ".csv"):
        notice.save_rows(made, tmp_path / f"rows{suffix}")
    parquet = pq.read_table(tmp_path / "rows.parquet")
    assert parquet.column_names == notice_columns()
    assert np.array(parquet["scores"][0].as_py()).shape == (9, LAYERS, 4)
    text = (tmp_path / "rows.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)[1]["low_score"][3] is None
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(tmp_path / "rows.csv")
    assert list(frame) == notice_columns()
    assert len(json.loads(frame["scores"][0])) == 9


def test_results_are_never_pickled(tmp_path: Path) -> None:
    for name in ("a.pkl", "a.PICKLE"):
        with pytest.raises(ValueError, match="would be a pickle, which can run code"):
            notice.save_rows([flow()], tmp_path / name)
        with pytest.raises(ValueError, match="would be a pickle, which can run code"):
            notice.load_rows(tmp_path / name)
    with pytest.raises(ValueError, match=r"kept as .parquet, .json or .csv, not as a.txt"):
        notice.save_rows([flow()], tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b'[{"scores": 1}]', b"a,b\n1,2\n", b"PAR1"])
@pytest.mark.parametrize("suffix", [".parquet", ".json", ".csv"])
def test_broken_results(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no results of NOTICE") as raised:
        notice.load_rows(path)
    assert "\n" not in str(raised.value)


def test_names_of_files() -> None:
    assert (
        notice.rows_name("mit_states", "image", "text_encoder", "crossattention_block", 500, attn_head=3)
        == "BLIP_temp_list_mit_states_image_corruption_text_encoder_crossattention_block_head_3_500.parquet"
    )
    assert (
        notice.rows_name("svo_probes", "text", "text_encoder", "output", 10)
        == "BLIP_temp_list_svo_probes_text_corruption_text_encoder_output_10.parquet"
    )


# Circuits


def test_circuits_are_the_heads_that_stand_out() -> None:
    scores = np.full((3, 12, 12), 0.1)
    scores[:, 5, 3] = [1, -1, 1]  # by size, whatever the sign
    scores[:, 0, 11] = 0.8
    scores[0, 2, 2] = 0.5  # in one question only
    by_head = np.abs(scores).mean(0)
    assert by_head[2, 2] < by_head.mean() + 2 * by_head.std() < by_head[0, 11]
    assert notice.get_circuits(scores) == {(5, 3), (0, 11)}
    assert notice.get_circuits(torch.from_numpy(scores)) == notice.get_circuits(scores)
    with pytest.raises(ValueError, match="scores hold NaN"):
        notice.get_circuits(np.full((1, 2, 2), np.nan))
    with pytest.raises(ValueError, match=r"scores must be \[questions, layers, heads\], not \[2, 2\]"):
        notice.get_circuits(np.ones((2, 2)))


def test_scores_at_the_correct_answer(tmp_path: Path) -> None:
    """From a table to a circuit."""
    flows = notice.debug_head_flows(
        *model(), table(tmp_path, 2), "text_encoder", "crossattention_block", 0, LAYERS, "image"
    )
    processor = tracer().processor
    own = notice.selected_scores(flows[1][0], processor, "bottom center", 2)
    assert own is not None
    assert np.array_equal(own, flows[1][0]["scores"][6, :, 2].numpy())
    assert notice.selected_scores(flows[1][0], processor, "circle") is None
    with pytest.warns(UserWarning, match="1 of 2 questions are left out"):
        scores = notice.head_scores(flows, processor, ["bottom", "circle"])
    assert scores.shape == (1, LAYERS, HEADS)
    assert scores[0, 2, 1] == flows[1][0]["scores"][6, 2, 0]
    found = notice.get_circuits(notice.head_scores(flows, processor, ["bottom", "bottom"], 2))
    assert found
    with pytest.raises(ValueError, match="in no question"):
        notice.head_scores(flows, processor, ["circle", "circle"])
