"""`blip-trace sweep`, `status` and `verify` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner, Result

from blip_trace import load_run
from blip_trace.cli import app
from blip_trace.scenes import random_scene


def call(*arguments: object) -> Result:
    """A command, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    """What it printed to either stream, on one line."""
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("sweeps") / "run"
    result = call("sweep", "--data", "scenes:4", "--samples", 1, "--threads", 1, "--out", out,
                  "--shard-size", 10)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "20 samples to trace in 2 shards" in said(result)
    assert "20 ok" in said(result)
    assert f"blip-trace report {out}" in said(result)
    return out


def test_status_and_verify_change_nothing(swept: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*")}
    status, verify = call("status", swept), call("verify", swept)
    assert status.exit_code == verify.exit_code == 0
    assert "20 of 20 done" in said(status)
    assert "nobody is at it" in said(status)
    assert "yes, checked" in said(status)
    assert "all as they were written: 20 ok" in said(verify)
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("*")} == before


def test_damage_is_found_and_mended(swept: Path, tmp_path: Path) -> None:
    """`verify` says which shard, and the short form of the command does it again."""
    out = tmp_path / "run"
    subprocess.run(["cp", "-a", swept, out], check=True)
    shard = out / "shards" / "000001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    verify = call("verify", out)
    assert verify.exit_code == 1
    assert "000001.parquet" in said(verify)
    again = call("sweep", "--out", out, "--threads", 1)
    assert again.exit_code == 0, again.output
    assert "shard 1 is done again" in said(again)
    assert call("verify", out).exit_code == 0
    assert shard.read_bytes() == (swept / "shards" / "000001.parquet").read_bytes()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = call("sweep", "--data", "scenes:3", "--out", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0, result.output
    for expected in ("15 on 3 images", "cells", "about", "MB"):
        assert expected in said(result)
    assert not (tmp_path / "run").exists()


def test_failed_samples_are_told_by_the_exit_code(tmp_path: Path) -> None:
    """And by their reason, in the results and in the report."""
    random = Random(1)
    random_scene(random).render(64).save(tmp_path / "a.png")
    rows = [
        {"id": "good", "image": "a.png", "question": "how many shapes are there", "answer": "3"},
        {"id": "lost", "image": "b.png", "question": "how many shapes are there", "answer": "3"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    result = call("sweep", "--data", tmp_path / "data.jsonl", "--out", out, "--samples", 1)
    assert result.exit_code == 3, result.output
    assert "1 error, 1 ok" in said(result)
    (failed,) = load_run(out).rows(["sample_id", "reason"], status="error")
    assert failed["sample_id"] == "lost"
    assert "b.png" in failed["reason"]

    random_scene(random).render(64).save(tmp_path / "b.png")
    retried = call("sweep", "--out", out, "--retry")
    assert retried.exit_code == 0, retried.output
    assert "2 ok" in said(retried)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "nowhere.csv"], "there is no file or folder nowhere.csv"),
        (["--data", "scenes:2", "--corrupt", "pair", "--std", "2"], "nothing goes with it"),
        (["--data", "scenes:2", "--metrics", "surprise"], "unknown metric 'surprise'"),
        (["--data", "scenes:2", "--executor", "cloud"], "unknown executor 'cloud'"),
        (["--data", "scenes:2", "--workers", "3"], "workers belong to processes and ray"),
        (["--data", "scenes:2", "--answer", "right"], "unknown answer 'right'"),
        (["--data", "scenes:2", "--patch-group", "2"], "--patch-group belongs to --stacks vision"),
        (["--data", "scenes:2", "--model", "nowhere"], "there is no model folder 'nowhere'"),
        ([], "holds no run"),
        (["--kinds", "mlp"], "--kinds cannot be given"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], expected: str) -> None:
    """Exit code 2, and no folder is left behind."""
    result = call("sweep", "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2, result.output
    assert expected in said(result)
    assert said(result).count("blip-trace:") == 1
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(swept: Path) -> None:
    """What differs is named."""
    result = call("sweep", "--data", "scenes:4", "--samples", 2, "--out", swept)
    assert result.exit_code == 2
    assert "settings.corruption.samples: planned 1, now 2" in said(result)
    assert call("verify", swept).exit_code == 0


def test_the_picture_that_is_swapped_in_is_part_of_the_run(tmp_path: Path) -> None:
    """Another one under the same name makes another run."""
    other, out = tmp_path / "other.png", tmp_path / "run"
    command = ["sweep", "--data", "scenes:1", "--corrupt", "swap-image", "--swap", other, "--out", out]
    missing = call(*command)
    assert missing.exit_code == 2
    assert "other.png" in said(missing)
    random_scene(Random(1)).render(64).save(other)
    assert call(*command).exit_code == call(*command).exit_code == 0
    random_scene(Random(2)).render(64).save(other)
    changed = call(*command)
    assert changed.exit_code == 2
    assert "files: planned" in said(changed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed(tmp_path: Path, number: signal.Signals) -> None:
    """130, with what to type to go on; what was done stays."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "blip_trace", "sweep", "--data", "scenes:40", "--samples", "1",
               "--shard-size", "10", "--threads", "1", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("receipts/*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, number)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert f"blip-trace sweep --out {out}" in " ".join(printed.split())
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.parquet")}
    assert 0 < len(done) < 20
    assert call("sweep", "--out", out, "--threads", 1).exit_code == 0
    assert {name: (out / "shards" / name).stat().st_mtime_ns for name in done} == done
    assert load_run(out).counts()["ok"] == 200


def test_help_needs_no_torch() -> None:
    """It comes at once."""
    script = (
        "import sys; from typer.testing import CliRunner; from blip_trace.cli import app;"
        "print(CliRunner().invoke(app, ['sweep', '--help']).exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "False"]
