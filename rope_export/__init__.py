"""Attention with rotary position embeddings, from PyTorch training to onnxruntime, with proof.

Names are imported when they are first used: what runs on a deployment machine (`replay`) needs
no PyTorch there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rope_export.attention import Attention as Attention
    from rope_export.decoders import DecoderWithCache as DecoderWithCache
    from rope_export.decoders import replace_attention as replace_attention
    from rope_export.errors import BadInputError as BadInputError
    from rope_export.errors import ExportError as ExportError
    from rope_export.errors import ProviderUnavailableError as ProviderUnavailableError
    from rope_export.errors import RopeExportError as RopeExportError
    from rope_export.exporter import ExportResult as ExportResult
    from rope_export.exporter import export as export
    from rope_export.migration import replace_rotary_embeddings as replace_rotary_embeddings
    from rope_export.report import Report as Report
    from rope_export.rotary import RotaryEmbedding as RotaryEmbedding
    from rope_export.rotation import apply_learned_rotations as apply_learned_rotations
    from rope_export.rotation import apply_rotary_emb as apply_rotary_emb
    from rope_export.rotation import broadcat as broadcat
    from rope_export.sinusoidal import (
        SinusoidalPositionalEncoding as SinusoidalPositionalEncoding,
    )
    from rope_export.sinusoidal import TokenEmbedding as TokenEmbedding
    from rope_export.specs import Latent as Latent
    from rope_export.specs import QKNorm as QKNorm
    from rope_export.trial import replay as replay
    from rope_export.validator import validate as validate

__version__ = "0.1.0"

_HOME = {
    "Attention": "attention",
    "BadInputError": "errors",
    "DecoderWithCache": "decoders",
    "ExportError": "errors",
    "ExportResult": "exporter",
    "Latent": "specs",
    "ProviderUnavailableError": "errors",
    "QKNorm": "specs",
    "Report": "report",
    "RopeExportError": "errors",
    "RotaryEmbedding": "rotary",
    "SinusoidalPositionalEncoding": "sinusoidal",
    "TokenEmbedding": "sinusoidal",
    "apply_learned_rotations": "rotation",
    "apply_rotary_emb": "rotation",
    "broadcat": "rotation",
    "export": "exporter",
    "replace_attention": "decoders",
    "replace_rotary_embeddings": "migration",
    "replay": "trial",
    "validate": "validator",
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
