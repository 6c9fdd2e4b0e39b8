"""Train a small language model, export it, prove it, and generate with onnxruntime alone.

python examples/train_and_deploy.py [FOLDER] [--steps 500] [--positions rope|sinusoidal]

The text is Python's own standard library, character by character, so nothing is downloaded. The
model is compiled and trained for about a minute and a half on two cores, exported with a cache of
keys and values, proven equal to PyTorch, and continues a text in a process without PyTorch.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export import (
    Attention,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
    TokenEmbedding,
    export,
)

PROMPT, NEW_TOKENS = "def __init__(self, ", 200
LONGEST = 512  # tokens served, prompt included
BATCH, LENGTH = 16, 128  # of a training step
Cache = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, hidden: int, heads: int, rope: RotaryEmbedding | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads, num_kv_heads=heads // 2, rope=rope)
        self.mlp_norm = nn.RMSNorm(hidden)
        self.gate_up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, past: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        """Hidden states ``[B, S, hidden]``, and the layer's cache where there is a past."""
        present = None
        if past is None:
            attended = self.attention(self.attention_norm(x), attention_mask=attention_mask)
        else:
            attended, present = self.attention(
                self.attention_norm(x), attention_mask=attention_mask, past=past
            )
        x = x + attended
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), present


class LanguageModel(nn.Module):
    """A decoder of characters."""

    def __init__(self, vocabulary: int, positions: str, hidden: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(vocabulary, hidden)
        heads = hidden // 32
        rope = self.encoding = None
        if positions == "rope":
            rope = RotaryEmbedding(32, layout="half", max_seq_len=LONGEST)
        else:
            self.encoding = SinusoidalPositionalEncoding(hidden, max_len=LONGEST, dropout=0.0)
        self.blocks = nn.ModuleList(Block(hidden, heads, rope) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: list[Cache] | None = None,
    ) -> dict[str, Tensor | list[Cache]]:
        """Logits ``[B, S, vocabulary]``; with a past also the cache of every layer."""
        x = self.embedding(input_ids)
        if self.encoding is not None:
            ids = None
            if attention_mask is not None:  # a token's place among the real ones of its row
                order = (attention_mask.cumsum(-1) - 1).clamp(min=0)
                ids = order[:, attention_mask.shape[1] - input_ids.shape[1] :]
            x = self.encoding(x, position_ids=ids)
        presents = []
        for layer, block in enumerate(self.blocks):
            past = None if past_key_values is None else past_key_values[layer]
            x, present = block(x, attention_mask, past)
            presents.append(present)
        logits = self.head(self.norm(x))
        if past_key_values is None:
            return {"logits": logits}
        return {"logits": logits, "present_key_values": presents}


def text_of_this_machine() -> str:
    """Sources of the standard library, ASCII only."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(errors="ignore") for file in files)
    return "".join(character for character in text if character.isascii())


def train(model: LanguageModel, data: Tensor, steps: int) -> list[float]:
    """Train on random windows of the text; the loss of every step."""
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses: list[float] = []

    def shown(_: object) -> str:
        return f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}" if losses else "compiling"

    with click.progressbar(
        range(steps), label="training", item_show_func=shown, file=sys.stderr
    ) as bar:
        for _ in bar:
            starts = torch.randint(len(data) - LENGTH - 1, (BATCH,)).tolist()
            window = torch.stack([data[start : start + LENGTH + 1] for start in starts])
            logits = compiled(window[:, :-1])["logits"]
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def generate(model: LanguageModel, prompt: Tensor, count: int) -> tuple[list[int], float]:
    """The likeliest characters after ``[1, S]`` ids, and how many a second."""
    past = [block.attention.empty_cache() for block in model.blocks]
    found: list[int] = []
    mask = torch.ones_like(prompt)
    answer = model(prompt, mask, past)
    start = time.perf_counter()
    for _ in range(count):
        found.append(int(answer["logits"][0, -1].argmax()))
        mask = torch.cat((mask, mask[:, :1]), dim=1)
        answer = model(torch.tensor([[found[-1]]]), mask, answer["present_key_values"])
    return found, count / (time.perf_counter() - start)


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--steps", default=500, show_default=True, help="Of training.")
@click.option("--positions", type=click.Choice(["rope", "sinusoidal"]), default="rope")
@click.option("--target", type=click.Choice(["ort", "onnx", "primitive"]), default="ort")
def main(folder: Path | None, steps: int, positions: str, target: str) -> None:
    """Train, export, prove, generate."""
    folder = folder or Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    text = text_of_this_machine()
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    data = torch.tensor([number[character] for character in text])
    model = LanguageModel(len(characters), positions)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(text):,} characters of {len(characters)} kinds, {count:,} weights, {positions}")

    # 1. Train, compiled.
    start = time.perf_counter()
    losses = train(model, data, steps)
    tail = losses[-20:]
    print(
        f"loss {losses[0]:.2f} -> {sum(tail) / len(tail):.2f} in {steps} steps, "
        f"{time.perf_counter() - start:.0f} s"
    )

    # 2. Export with a cache, and prove the graph: shapes, names and files in one call.
    model.eval()
    batch, length, earlier = 2, 8, 5
    example = {
        "input_ids": data[: batch * length].reshape(batch, length),
        "attention_mask": torch.ones(batch, earlier + length, dtype=torch.int64),
        "past_key_values": [
            (torch.randn(batch, 2, earlier, 32), torch.randn(batch, 2, earlier, 32))
            for _ in model.blocks
        ],
    }
    labels = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "past_sequence+sequence"},
        "past_key_values": {0: "batch", 2: "past_sequence"},
    }
    result = export(
        model,
        folder / "artifact",
        kwargs=example,
        dynamic_shapes=labels,
        max_seq_len=LONGEST,
        target=target,
        validate=True,
    )
    verdict = "proven on " + ", ".join(p for p, s in result.report.providers.items() if s.nodes)
    print(f"{verdict if result.report.passed else 'FAILED'}: {result.path}")
    (folder / "characters.json").write_text(json.dumps(characters))

    # 3. Generate in PyTorch, and in a process that has only onnxruntime.
    prompt = torch.tensor([[number[character] for character in PROMPT]])
    ours, rate = generate(model, prompt, NEW_TOKENS)
    script = Path(__file__).with_name("generate.py")
    command = [sys.executable, str(script), str(folder), PROMPT, "--tokens", str(NEW_TOKENS)]
    answer = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    served = json.loads(answer.stdout)
    same = served["ids"] == ours
    print("\n" + PROMPT + "".join(characters[index] for index in served["ids"]) + "\n")
    print(f"the same {NEW_TOKENS} tokens as PyTorch: {'yes' if same else 'NO'}")
    print(f"onnxruntime    {served['tokens_per_second']:6.0f} tokens per second")
    print(f"eager PyTorch  {rate:6.0f} tokens per second")
    print(f"again: python {os.path.relpath(script)} {folder} 'import '")
    sys.exit(0 if same and result.report.passed else 1)


if __name__ == "__main__":
    main()
