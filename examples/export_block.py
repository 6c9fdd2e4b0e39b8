"""Compile, export, prove and run one attention block.

python examples/export_block.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from rope_export import Attention, RotaryEmbedding, export, validate

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "block"

# 1. A block as one trains it: one graph under torch.compile, whatever the length.
torch.manual_seed(0)
rope = RotaryEmbedding(32, theta=10000.0, layout="half", max_seq_len=512)
attention = Attention(hidden_size=256, num_heads=8, num_kv_heads=4, rope=rope)
compiled = torch.compile(attention, fullgraph=True)
x = torch.randn(2, 100, 256)
compiled(x).square().mean().backward()
print(f"compiled and differentiated: gradient norm {attention.q_proj.weight.grad.norm():.2e}")

# 2. Export it, and prove the graph against it.
result = export(attention, folder, target="ort")
report = validate(result, attention)
print(f"operators: {result.ops}")
print(f"{'proven' if report.passed else 'FAILED'} on {', '.join(report.providers)}: {result.path}")

# 3. Run it as an application does.
session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
(output,) = session.run(None, {"hidden_states": x.numpy()})
difference = np.abs(output - attention(x).detach().numpy()).max()
print(f"largest difference from eager PyTorch: {difference:.1e}")
sys.exit(not report.passed)
