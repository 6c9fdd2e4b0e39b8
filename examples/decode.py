"""Serve tokens from an exported block with `rope_export.runtime`: no PyTorch in this process.

python examples/decode.py [ARTIFACT]    (made by `rope-export block --cache`; or one is made here)
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rope_export.runtime import Decoder

BATCH, PROMPT, SHORTER, TOKENS = 2, 1024, 700, 200


def serve(folder: Path) -> float:
    """Prefill two prompts of different lengths, decode both, and return tokens per second."""
    decoder = Decoder.open(folder, batch=BATCH)
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((BATCH, PROMPT, decoder.hidden_size)).astype(decoder.dtype)
    mask = np.ones((BATCH, PROMPT), dtype=np.int64)
    mask[1, SHORTER:] = 0  # padded on the right, the side the graph was exported for
    output = decoder.prefill(prompts, attention_mask=mask)
    token = np.stack((output[0, PROMPT - 1 :], output[1, SHORTER - 1 : SHORTER]))
    start = time.perf_counter()
    for _ in range(TOKENS):
        token = decoder.decode(token)  # a model would do more in between
    rate = BATCH * TOKENS / (time.perf_counter() - start)
    print(f"rows hold {decoder.lengths} of {decoder.capacity} tokens")
    assert "torch" not in sys.modules
    return rate


def eager(folder: Path) -> float:
    """Tokens per second of the same block in eager PyTorch, on as many tokens."""
    import torch

    from rope_export.attention.random_block import block_of_artifact

    block = block_of_artifact(folder)
    dtype = block.dtype
    with torch.no_grad():
        x = torch.randn(BATCH, PROMPT, block.hidden_size, dtype=dtype)
        y, cache = block(x, past=block.empty_cache(BATCH))
        token, start = y[:, -1:], time.perf_counter()
        for _ in range(TOKENS):
            token, cache = block(token, past=cache)
    return BATCH * TOKENS / (time.perf_counter() - start)


def main() -> None:
    """Serve, then let a process of its own do the same in PyTorch."""
    if sys.argv[1:2] == ["--eager"]:
        print(eager(Path(sys.argv[2])))
        return
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    if not (folder / "model.onnx").exists():
        folder /= "block"
        options = ["--cache", "--window=512", "--kv-heads=4", "--seq=2048", f"--out={folder}"]
        subprocess.run([sys.executable, "-m", "rope_export._cli", "block", *options], check=True)
    ours = serve(folder)
    command = [sys.executable, __file__, "--eager", str(folder)]
    theirs = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"onnxruntime    {ours:7.0f} tokens per second")
    print(f"eager PyTorch  {theirs:7.0f} tokens per second  (onnxruntime: {ours / theirs:.1f}x)")


main()
