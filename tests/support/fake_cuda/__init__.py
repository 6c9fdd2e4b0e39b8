"""Sessions on CUDA without a GPU: a process in which onnxruntime finds a made-up device."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rope_export.artifacts.cache_layout import CacheLayout

WORKER = Path(__file__).parent / "worker.py"


class FakeCuda:
    """A process whose CUDA device is in host memory, asked for one graph after another.

    Args:
        libraries: where `libraries.build` made what stands in for CUDA's.
        cudnn: whether cuDNN is there.
    """

    def __init__(self, libraries: Path, *, cudnn: bool) -> None:
        self._command = [sys.executable, str(WORKER), str(libraries)]
        self._command += ["with-cudnn" if cudnn else "without"]
        self._process: subprocess.Popen[str] | None = None

    def look(self, model: Path, layout: CacheLayout | None = None) -> dict[str, Any]:
        """What can be known of a graph on CUDA; see worker.py.

        Args:
            model: the ONNX file.
            layout: how it keeps its cache.

        Raises:
            RuntimeError: the process ended, as native code does when it is surprised.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"model": str(model), "cache": None if layout is None else asdict(layout)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._process = None
            raise RuntimeError(f"the process on the made-up device ended with {code}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        """Let the process end."""
        if self._process is not None:
            self._process.communicate(timeout=60)
