"""Where onnxruntime's kernels for CUDA differ from those for the CPU, and what is made of it.

`rules` decides by it; here is each fact once, with where it is from: ``host`` was seen in
onnxruntime 1.31's CUDA provider itself, whose kernels check shapes, types and attributes on the
host before they launch anything; else it was read where it says. Nothing here was seen on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One of them.

    Attributes:
        what: what it is about.
        cpu: what the CPU's kernels do.
        cuda: what CUDA's do.
        so: what follows for a graph.
        seen: ``host``, or where it was read.
    """

    what: str
    cpu: str
    cuda: str
    so: str
    seen: str


DIFFERENCES = (
    Difference(
        "float32",
        "GroupQueryAttention",
        "GroupQueryAttention has float16 and bfloat16 only: a float32 node goes to the CPU",
        "Attention attends in float32 graphs for CUDA",
        "host",
    ),
    Difference(
        "bfloat16",
        "no kernel of MatMul, RotaryEmbedding or attention",
        "all of them",
        "a bfloat16 graph is for CUDA alone",
        "host",
    ),
    Difference(
        "kernel of GroupQueryAttention",
        "flash, linear in the length, in causal order and float32 without soft cap and sinks; else "
        "one float32 copy of the scores, in half precision two",
        "flash for heads of 8 to 256 (a multiple of 8), memory-efficient up to 512; XQA for one "
        "token after a past in one buffer, heads of 64, 128 or 256; cuDNN's for prompts on "
        "Hopper where cuDNN 9.3 is",
        "memory linear in the length",
        "host",
    ),
    Difference(
        "kernel of Attention",
        "all scores in memory",
        "flash in half precision, memory-efficient in float32 with as many key as query heads; all "
        "scores for grouped float32 heads, for widths that are no multiple of 8, for "
        "half-precision values of another width than keys, and with a mask unless the number of "
        "keys is a multiple of 4",
        "grouped float32 heads are repeated where there is neither cache, mask nor window",
        "host",
    ),
    Difference(
        "MultiHeadAttention",
        "flash where not causal",
        "needs cuDNN, and computes all scores of fewer than 256 float32 tokens",
        "taken only where a graph is for both providers",
        "host",
    ),
    Difference(
        "cuDNN",
        "",
        "ReduceMax and other reductions, convolutions, pooling and RNNs need it",
        "no graph of a block needs it; one that does says so, and is refused where it is not",
        "host",
    ),
    Difference(
        "several new tokens of a batch after a past",
        "refused: one row at a time",
        "refused: one row at a time",
        "on the CPU the rows are scanned; a graph for CUDA alone has no control flow, and a "
        "Decoder gives such tokens one by one",
        "host",
    ),
    Difference(
        "lengths of rows",
        "on the host",
        "`seqlens_k` on the device, `total_sequence_length` on the host",
        "lengths are counted from the mask, where it is; the total comes from its shape: a "
        "decoding step copies nothing between the two, and can be captured as a CUDA graph",
        "host",
    ),
    Difference(
        "control flow (`If`, `Scan`)",
        "runs",
        "runs, but keeps a CUDA graph from being captured",
        "none in a graph for CUDA alone",
        "host",
    ),
    Difference(
        "`sliding_window_cache`",
        "any capacity from the window on; past and present may be two buffers",
        "the capacity is the window, and past and present are one buffer",
        "so are those of a graph for CUDA, and of its Decoder",
        "host",
    ),
    Difference(
        "`attention_bias` of GroupQueryAttention",
        "taken",
        "taken by 1.31, with all scores in memory; refused before",
        "only blocks of queries on the CPU have one",
        "host",
    ),
    Difference(
        "padding of a first call that is not causal",
        "hidden by `seqlens_k`",
        "attended to: of a first call, the lengths are not read",
        "Attention with a mask attends there",
        "onnxruntime/contrib_ops/cuda/bert/group_query_attention_impl.cu",
    ),
    Difference(
        "a window without causal order",
        "refused",
        "refused",
        "on the CPU blocks of queries are scanned, each with the keys it sees; elsewhere Attention "
        "with a mask attends",
        "host",
    ),
    Difference(
        "positions beyond a table of angles",
        "refused when run",
        "RotaryEmbedding reads beyond the table",
        "angles are looked up outside of it, and such a token is not a number",
        "onnxruntime/core/providers/cuda/llm/rotary_embedding_impl.cu",
    ),
    Difference(
        "`is_causal` of Attention with fewer queries than keys and no past",
        "in 1.31 the first query sees the first key; before, the last one saw all",
        "the first query sees the first key",
        "a mask is written instead",
        "github.com/microsoft/onnxruntime/issues/29020",
    ),
)
