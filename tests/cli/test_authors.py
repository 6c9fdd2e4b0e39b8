"""`rope-export module` on what ten people wrote: proven, or refused in a line they would accept."""

from __future__ import annotations

from pathlib import Path

import authors
import pytest
from selection import slow_unless

PROVEN = {
    "video_dit": [
        "frames 1 … 16",
        "h 1 … 16",
        "w 1 … 16",
        "note: timestep is 500.0 in the example",
    ],
    "streaming": ["frames 1 and more"],
    "vision": ["rows 1 … 16", "cols 1 … 16"],
    "protein": ["residues 1 … 1024", "note: what the module keeps from one call to the next"],
    "embedder": ["sequence 1 and more"],
    "xtransformers": ["note: mask is all True in the example: padding is not proven"],
    "torchtune": ["s 1 and more", "b 1 and more"],
    "conformer": ["frames 4 … 400"],
    "patchtst": ["patches 1 … 128", "note: what the module keeps from one call to the next"],
    "modernbert": ["sequence 1 and more"],
}


QUICK = ("vision", "xtransformers", "patchtst")


@pytest.mark.parametrize("name", slow_unless(lambda name: name in QUICK, PROVEN))
def test_proven(name, tmp_path, cli_here):
    run = cli_here("module", f"{authors.__file__}:{name}", "--out", name)
    assert run.returncode == 0, run.stderr + run.stdout
    report = (tmp_path / name / "report.md").read_text()
    for said in PROVEN[name]:
        assert said.removeprefix("note: ") in report


def test_a_cache_in_buffers_is_refused_with_its_line(tmp_path, cli_here):
    run = cli_here("module", f"{authors.__file__}:litgpt", "--out", "x")
    assert run.returncode == 2
    said = run.stderr.splitlines()[-1]
    assert f"{Path(authors.__file__).name}:" in said
    assert "`k = self.k.index_copy_(2, input_pos, k)` changes k" in said
    assert "take k as an argument and return what becomes of it" in said
    assert not (tmp_path / "x").exists()
