"""Every example runs as a newcomer runs it, and what is generated for the reader is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAYS = {"export_block.py": "proven on cpu", "decode.py": "eager PyTorch  "}
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.name)
def test_example(script, tmp_path):
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert SAYS[script.name] in result.stdout


def test_the_page_of_operators_says_what_the_rules_say():
    from rope_export.lowering import table

    page = Path(__file__).parents[1] / "docs" / "operators.md"
    assert page.read_text(encoding="utf-8") == table.page()
