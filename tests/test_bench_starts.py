"""The scripts that measure starts and an open model, on the CPU with the tiny model."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trt_wan.benchmarks.machine.host_memory import HostPeak, own_bytes
from trt_wan.runtime.weights.tiny import write_tiny_weights

SHAPE = "--model tiny --size 64x48 --window 13 --steps 2 --executor onnxruntime"


def run(module: str, arguments: str, home: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        f"trt_wan.benchmarks.measure.{module}",
        *SHAPE.split(),
        *arguments.split(),
    ]
    env = os.environ | {"TRT_WAN_HOME": str(home), "PATH": os.defpath}  # no nvidia-smi
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    document: dict[str, Any] = json.loads(line)
    return document


@pytest.mark.long
def test_starts_from_files_and_from_generated_weights(tiny_home: Path, tmp_path: Path) -> None:
    write_tiny_weights(tmp_path / "files", 0)
    result = run("weights_table", f"--bf16 {tmp_path}/files --out {tmp_path}", tiny_home)
    rows = result["rows"]
    assert [(row["weights"], row["memory"], row["prompt"]) for row in rows] == [
        (weights, "resident", prompt)
        for weights in ("bf16 files", "generated")
        for prompt in ("new", "known")
    ]
    for row in rows:
        assert len(row["step_seconds"]) == 2 and row["precision"] == "fp32"
        assert (
            sum(row["step_seconds"]) < row["job_seconds"] and row["first_step_seconds"] < row["job_seconds"]
        )
        assert row["host_bytes"] > 100_000_000 and row["loaded_bytes"] is None
    assert rows[0]["sha256"] == rows[1]["sha256"] != rows[2]["sha256"], "a known prompt changes no frame"
    with (tmp_path / "weights-table.csv").open() as file:
        names = {(row["kind"], row["name"]) for row in csv.DictReader(file)}
    assert ("start first step s", "bf16 files, resident, new prompt") in names


@pytest.mark.long
def test_five_jobs_on_an_open_model_equal_single_runs(tiny_home: Path, tmp_path: Path) -> None:
    result = run("open_model_jobs", f"--second-size 48x64 --out {tmp_path}", tiny_home)
    jobs = result["jobs"]
    assert [job["name"].partition(", ")[2] for job in jobs] == [
        "animate",
        "animate",
        "replace",
        "stopped after a step",
        "another prompt",
    ]
    *_, stopped, last = jobs
    assert stopped["single_sha256"] is None and len(stopped["step_seconds"]) == 1
    assert stopped["frames"] == 0 and stopped["sha256"] == hashlib.sha256().hexdigest()
    finished = [job for job in jobs if job is not stopped]
    assert all(job["sha256"] == job["single_sha256"] and job["frames"] == 13 for job in finished)
    assert len({job["sha256"] for job in finished}) == 4
    assert last["overhead_seconds"] > 0 and "open-model-jobs.json" in os.listdir(tmp_path)


def test_host_memory_leaves_mapped_files_out(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmHWM:\t900 kB\nRssAnon:\t 300 kB\nRssFile:\t 500 kB\nRssShmem:\t 20 kB\n")
    assert own_bytes(status) == 320 * 1024
    assert own_bytes(tmp_path / "nothing") is None


@pytest.mark.skipif(own_bytes() is None, reason="/proc/self/status is Linux's")
def test_the_peak_of_host_memory_is_kept() -> None:
    with HostPeak() as host:
        before = host.peak_bytes
        block = b"\x01" * 200_000_000
        while (host.peak_bytes or 0) < (before or 0) + 150_000_000:
            pass
        del block
    assert host.peak_bytes is not None and before is not None
    assert host.peak_bytes > before + 150_000_000
