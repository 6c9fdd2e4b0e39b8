"""Every example runs as a newcomer runs it and says what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAYS = {
    "export_block.py": "proven on cpu",
    "decode.py": "eager PyTorch  ",
    "train_and_deploy.py": "the same 200 tokens as PyTorch: yes",
}
AFTER = {"generate.py": "train_and_deploy.py"}  # takes what another made
# Enough to see it work; a newcomer leaves these out.
FEWER = {"train_and_deploy.py": ["--steps=12"], "generate.py": ["import ", "--tokens=20"]}
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def run(script: Path, folder: Path, *more: str, **environment: str) -> str:
    """Run an example and return what it prints."""
    command = [sys.executable, str(script), str(folder), *more, *FEWER.get(script.name, [])]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [e for e in EXAMPLES if e.name not in AFTER], ids=lambda p: p.name
)
def test_example(script, tmp_path):
    assert SAYS[script.name] in run(script, tmp_path)
    for name, before in AFTER.items():
        if before == script.name:
            assert run(script.with_name(name), tmp_path).startswith("import ")


@pytest.mark.slow
def test_the_first_example_without_a_compiler(tmp_path):
    (script,) = (e for e in EXAMPLES if e.name == "export_block.py")
    assert SAYS[script.name] in run(script, tmp_path, TORCHDYNAMO_DISABLE="1")


@pytest.mark.slow
def test_the_sinusoidal_encoding_deploys_too(tmp_path):
    script = next(e for e in EXAMPLES if e.name == "train_and_deploy.py")
    options = ("--positions=sinusoidal", "--target=onnx")
    says = run(script, tmp_path, *options, TORCHDYNAMO_DISABLE="1")  # compiled is the other one
    assert SAYS[script.name] in says
    assert "sinusoidal" in says
