"""What a proof keeps to: bytes stored, operations of truth, and what it says where it must stop."""

from __future__ import annotations

STORED_BYTES = 64 * 2**20
# Beyond this many operations (about ten seconds of float64) truth of a block is sampled.
TRUTH_FLOPS = 1e12
RANDOM_SCALES = (
    "the scales of the cache were chosen by random hidden states: give calibration inputs as the "
    "block meets them, from Python (export(..., calibration=...)), before it serves a trained model"
)
FOLLOWS_LENGTH = (
    "frequencies follow the length: a cached key keeps those of the call it was rotated in, so "
    "decoding across the switch differs from one full pass, in PyTorch as here"
)
