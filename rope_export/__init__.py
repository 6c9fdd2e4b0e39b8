"""Attention with rotary position embeddings, from PyTorch training to onnxruntime, with proof.

Names are imported when they are first used: what runs on a deployment machine (`replay`) needs
no PyTorch there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rope_export.artifacts.version import __version__ as __version__
from rope_export.exporting import stages

if TYPE_CHECKING:
    from rope_export.artifacts.report import Report as Report
    from rope_export.artifacts.result import ExportResult as ExportResult
    from rope_export.attention.block import Attention as Attention
    from rope_export.attention.specs import Latent as Latent
    from rope_export.attention.specs import QKNorm as QKNorm
    from rope_export.errors import BadInputError as BadInputError
    from rope_export.errors import ExportError as ExportError
    from rope_export.errors import ProviderUnavailableError as ProviderUnavailableError
    from rope_export.errors import RopeExportError as RopeExportError
    from rope_export.exporting.export import export as export
    from rope_export.models.decoder_with_cache import DecoderWithCache as DecoderWithCache
    from rope_export.models.replacement import replace_attention as replace_attention
    from rope_export.positional.sinusoidal import (
        SinusoidalPositionalEncoding as SinusoidalPositionalEncoding,
    )
    from rope_export.positional.sinusoidal import TokenEmbedding as TokenEmbedding
    from rope_export.proof.validator import validate as validate
    from rope_export.rope.embedding import RotaryEmbedding as RotaryEmbedding
    from rope_export.rope.migration import replace_rotary_embeddings as replace_rotary_embeddings
    from rope_export.rope.rotation import apply_learned_rotations as apply_learned_rotations
    from rope_export.rope.rotation import apply_rotary_emb as apply_rotary_emb
    from rope_export.rope.rotation import broadcat as broadcat
    from rope_export.runtime.replay import replay as replay

_HOME = {
    "Attention": "attention.block",
    "BadInputError": "errors",
    "DecoderWithCache": "models.decoder_with_cache",
    "ExportError": "errors",
    "ExportResult": "artifacts.result",
    "Latent": "attention.specs",
    "ProviderUnavailableError": "errors",
    "QKNorm": "attention.specs",
    "Report": "artifacts.report",
    "RopeExportError": "errors",
    "RotaryEmbedding": "rope.embedding",
    "SinusoidalPositionalEncoding": "positional.sinusoidal",
    "TokenEmbedding": "positional.sinusoidal",
    "apply_learned_rotations": "rope.rotation",
    "apply_rotary_emb": "rope.rotation",
    "broadcat": "rope.rotation",
    "export": "exporting.export",
    "replace_attention": "models.replacement",
    "replace_rotary_embeddings": "rope.migration",
    "replay": "runtime.replay",
    "validate": "proof.validator",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


def _prover() -> stages.Prover:
    from rope_export.proof import validator

    return validator


def _racer() -> stages.Racer:
    from rope_export.bench import race

    return race


stages.offer(prover=_prover, racer=_racer)
