"""Continue a text with a model that `train_and_deploy.py` exported: no PyTorch in this process.

python examples/generate.py FOLDER [PROMPT] [--tokens 200] [--provider cpu] [--json]
"""

import json
import sys
import time
from pathlib import Path

import click
import numpy as np

from rope_export.runtime import Decoder


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("prompt", default="def main(")
@click.option("--tokens", default=200, show_default=True, help="How many to add.")
@click.option("--provider", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print ids and tokens per second.")
def main(folder: Path, prompt: str, tokens: int, provider: str, as_json: bool) -> None:
    """Take the likeliest character again and again."""
    characters = json.loads((folder / "characters.json").read_text())
    ids = np.array([[characters.index(character) for character in prompt]])
    decoder = Decoder.open(folder / "artifact", provider=provider)
    logits = decoder.prefill(ids)
    found: list[int] = []
    start = time.perf_counter()
    for _ in range(tokens):
        found.append(int(logits[0, -1].argmax()))
        logits = decoder.decode([[found[-1]]])
    rate = tokens / (time.perf_counter() - start)
    assert "torch" not in sys.modules
    if as_json:
        print(json.dumps({"ids": found, "tokens_per_second": rate}))
    else:
        print(prompt + "".join(characters[index] for index in found))
        print(f"\n{rate:.0f} tokens per second", file=sys.stderr)


main()
