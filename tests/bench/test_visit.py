"""The driver of a visit loses nothing when a job fails, dies or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from visit.__main__ import STAGES
from visit.findings import Findings
from visit.processes import Job, do

FAILS = Job("fails", "json:loads", {"s": "{"})
DIES = Job("dies", "os:_exit", {"status": 3})
HANGS = Job("hangs", "signal:pause", {}, limit=5.0)
FINDS = Job("finds", "json:loads", {"s": '[{"ratio": Infinity}, {"passed": true}]'})


@pytest.fixture
def findings(tmp_path):
    return Findings(tmp_path / "visit.jsonl")


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "visit.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_next_job_is_done_whatever_became_of_the_one_before(tmp_path, findings):
    do([FAILS, DIES, HANGS, FINDS], findings, workers=1, until=time.monotonic() + 300)
    found = [(line["stage"], line["found"]) for line in lines(tmp_path)]
    assert [stage for stage, _ in found] == ["fails", "dies", "hangs", "finds", "finds"]
    assert found[0][1]["error"].startswith("JSONDecodeError")
    assert found[1][1]["error"] == "the process ended with 3"
    assert found[2][1]["error"] == "took too long"
    assert found[3][1]["ratio"] == "Infinity"
    assert found[4][1]["passed"]


def test_what_has_not_begun_in_time_is_counted(tmp_path, findings):
    assert do([FINDS, FAILS], findings, workers=2, until=time.monotonic() - 1) == []
    assert [line["found"] for line in lines(tmp_path)] == [{"left out for lack of time": 2}]


def test_findings_are_collected_with_the_machine_apart(tmp_path, findings):
    findings.add("machine", {"provider": "cuda"}, {"date": "2026-01-02", "gpu": "a GPU"})
    findings.add("telling", {"variant": "a cache"}, {"passed": True})
    findings.collect(tmp_path / "all.json")
    document = json.loads((tmp_path / "all.json").read_text())
    assert (document["date"], document["machine"]["gpu"]) == ("2026-01-02", "a GPU")
    assert [line["stage"] for line in document["findings"]] == ["telling"]


@pytest.mark.slow
def test_every_stage_runs_on_the_cpu(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "run.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, "cuda", "--dry-run", tmp_path],
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(tmp_path)
    assert {line["stage"] for line in found} == {*STAGES, "end"}
    wrong = [line for line in found if "error" in line["found"]]
    assert wrong == []
    verdicts = [line["found"]["passed"] for line in found if "passed" in line["found"]]
    assert verdicts
    assert all(verdicts)
    (document,) = tmp_path.glob("*-visit.json")
    assert json.loads(document.read_text())["machine"]["unavailable"] is None
