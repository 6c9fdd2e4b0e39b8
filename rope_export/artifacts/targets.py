"""Targets, providers and dtypes by name, as a deployment machine knows them: without PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

TargetName = Literal["ort", "onnx", "primitive"]
TARGETS: tuple[str, ...] = get_args(TargetName)
OPSETS: dict[str, int] = {"ort": 23, "onnx": 23, "primitive": 18}
IR_VERSION = 10  # what torch.onnx.export stamps on every graph
Provider = Literal["cpu", "cuda"]
PROVIDERS: tuple[str, ...] = get_args(Provider)
ENDPOINTS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")
