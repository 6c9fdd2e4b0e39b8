"""Measuring: the same block in PyTorch and in onnxruntime, each contender in its own process."""

from rope_export.bench.block import CONTENDERS as CONTENDERS
from rope_export.bench.block import PHASES as PHASES
from rope_export.bench.block import measure as measure
from rope_export.bench.results import Measurement as Measurement
from rope_export.bench.results import Results as Results
