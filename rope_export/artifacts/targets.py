"""Targets, providers and dtypes by name, as a deployment machine knows them: without PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

TargetName = Literal["ort", "onnx", "primitive"]
TARGETS: tuple[str, ...] = get_args(TargetName)
OPSETS: dict[str, int] = {"ort": 23, "onnx": 23, "primitive": 18}
IR_VERSION = 10  # what torch.onnx.export stamps on every graph
# As low as its operators allow, for runtimes that are older than the newer operators.
IR_VERSIONS: dict[str, int] = {"ort": IR_VERSION, "onnx": IR_VERSION, "primitive": 8}
Provider = Literal["cpu", "cuda"]
PROVIDERS: tuple[str, ...] = get_args(Provider)
ENDPOINTS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")
